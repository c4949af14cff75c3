//! Handles triggers, rules and event triggers that would be active on a spare.
//!
//! The session that applies the primary's changes silences ordinary triggers and rules by itself,
//! because they did their work on the primary. It does not silence those that are `ENABLE ALWAYS`
//! or `ENABLE REPLICA`: their rows would be here twice. So they are disabled on the spare, and
//! their state is recorded beside the rows. A promotion restores that state.

use super::postgres::datastore_error::DatastoreError;
use super::postgres::session::WriteSession;
use super::spare_db::{HolderError, Silenced, SpareDb};
use tokio_postgres::error::SqlState;

/// Active triggers, each with the statement that disables it and the one that restores it. Event
/// triggers come first, because they might fire for these very statements. Objects of an extension
/// are left to the extension.
const AWAKE: &str = "
SELECT place, named, silence, wake FROM (
    SELECT 0 AS place, format('event trigger %I', evtname) AS named,
        format('ALTER EVENT TRIGGER %I DISABLE', evtname) AS silence,
        format('ALTER EVENT TRIGGER %I ENABLE%s', evtname, CASE evtenabled WHEN 'A' THEN ' ALWAYS' WHEN 'R' THEN ' REPLICA' ELSE '' END) AS wake
    FROM pg_event_trigger e WHERE evtenabled <> 'D' AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_event_trigger'::regclass AND d.objid = e.oid AND d.deptype = 'e')
    UNION ALL
    SELECT 1, format('trigger %I of %I.%I', tgname, n.nspname, c.relname),
        format('ALTER TABLE %I.%I DISABLE TRIGGER %I', n.nspname, c.relname, tgname),
        format('ALTER TABLE %I.%I ENABLE %s TRIGGER %I', n.nspname, c.relname, CASE tgenabled WHEN 'A' THEN 'ALWAYS' ELSE 'REPLICA' END, tgname)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND tgenabled IN ('A', 'R') AND NOT tgisinternal AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
    UNION ALL
    SELECT 1, format('rule %I of %I.%I', rulename, n.nspname, c.relname),
        format('ALTER TABLE %I.%I DISABLE RULE %I', n.nspname, c.relname, rulename),
        format('ALTER TABLE %I.%I ENABLE %s RULE %I', n.nspname, c.relname, CASE ev_enabled WHEN 'A' THEN 'ALWAYS' ELSE 'REPLICA' END, rulename)
    FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND ev_enabled IN ('A', 'R') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_') awake
ORDER BY place, named";

/// Disables triggers that would be active while changes are applied. `session` is the applying
/// session, and `token` the one in the recovery point.
pub async fn silence_triggers(session: &WriteSession, token: i64) -> Result<(), HolderError> {
    let doing = "looking for triggers that would be at work here";
    let found = session.query(doing, AWAKE, &[]).await?;
    if found.is_empty() {
        return Ok(());
    }
    let doing = "disabling a trigger";
    let spare = SpareDb::of(session);
    spare.begin_as_holder(token).await?;
    for row in &found {
        if row.get::<_, i32>(0) == 0 {
            session.batch(doing, row.get(2)).await?;
        }
    }
    spare.make_silenced().await?;
    for row in &found {
        let (place, named, silence, wake): (i32, &str, &str, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        session.batch(doing, silence).await?;
        spare
            .record_silenced(&Silenced { named, place, wake })
            .await?;
        log::info!(
            "local: {named} would be at work on copied rows; it is disabled here until this cluster is promoted"
        );
    }
    Ok(session.batch("ending the transaction", "COMMIT").await?)
}

/// Restores the triggers' state of the primary, in a database that is to become one.
pub async fn wake_triggers(inside: &WriteSession, token: i64) -> Result<(), HolderError> {
    let spare = SpareDb::of(inside);
    let statements = spare.waking().await?;
    if statements.is_empty() {
        return Ok(());
    }
    spare.begin_as_holder(token).await?;
    run(inside, &statements).await?;
    spare.forget_silenced().await?;
    Ok(inside.batch("ending the transaction", "COMMIT").await?)
}

/// Does the same in a database that nobody else uses, from the record in another one.
pub async fn wake_triggers_as_in(
    visible: &WriteSession,
    inside: &WriteSession,
) -> Result<(), HolderError> {
    let statements = SpareDb::of(visible).waking().await?;
    inside.batch("beginning a transaction", "BEGIN").await?;
    run(inside, &statements).await?;
    Ok(inside.batch("ending the transaction", "COMMIT").await?)
}

/// Runs the statements. A trigger that does not exist any more must not prevent a promotion.
async fn run(session: &WriteSession, statements: &[String]) -> Result<(), DatastoreError> {
    let doing = "setting a trigger back to what it was";
    for statement in statements {
        session.batch(doing, "SAVEPOINT one").await?;
        match session.batch(doing, statement).await {
            Err(error) if is_gone(&error) => {
                log::warn!("{error}; it is left out");
                session.batch(doing, "ROLLBACK TO one").await?;
            }
            done => done?,
        }
    }
    Ok(())
}

fn is_gone(error: &DatastoreError) -> bool {
    [SqlState::UNDEFINED_OBJECT, SqlState::UNDEFINED_TABLE]
        .iter()
        .any(|state| error.sql_state.as_ref() == Some(state))
}

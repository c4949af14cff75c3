//! Handles triggers, rules and event triggers that would be active on a spare.
//!
//! The session that applies the primary's changes silences ordinary triggers and rules by itself,
//! because they did their work on the primary. It does not silence those that are `ENABLE ALWAYS`
//! or `ENABLE REPLICA`: their rows would be here twice. So they are disabled on the spare, and
//! their state is recorded beside the rows. A promotion restores that state.

use crate::cluster::SqlState;
use crate::cluster::{DatastoreError, LocalSession, StateError};
use crate::replication::error::PassError;

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

/// Part of our schema beside the rows. Databases that an older program copied do not have it.
pub(crate) const SILENCED: &str = "
CREATE TABLE IF NOT EXISTS warm_spare.silenced (
    named text PRIMARY KEY,
    place int NOT NULL,
    wake text NOT NULL);
";

/// Disables triggers that would be active while changes are applied. `session` is the applying
/// session, and `token` the one in the recovery point.
pub(crate) async fn silence(session: &LocalSession, token: i64) -> Result<(), PassError> {
    let doing = "looking for triggers that would be at work here";
    let found = session.query(doing, AWAKE, &[]).await?;
    if found.is_empty() {
        return Ok(());
    }
    let doing = "disabling a trigger";
    begin_as_holder(session, token).await?;
    for row in &found {
        if row.get::<_, i32>(0) == 0 {
            session.batch(doing, row.get(2)).await?;
        }
    }
    session
        .batch("making our table of silenced triggers", SILENCED)
        .await?;
    for row in &found {
        let (place, named, silence, wake): (i32, &str, &str, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        session.batch(doing, silence).await?;
        let sql = "INSERT INTO warm_spare.silenced (named, place, wake) VALUES ($1, $2, $3) \
                   ON CONFLICT (named) DO UPDATE SET wake = excluded.wake";
        session
            .execute(doing, sql, &[&named, &place, &wake])
            .await?;
        log::info!(
            "local: {named} would be at work on copied rows; it is disabled here until this cluster is promoted"
        );
    }
    Ok(session.batch("ending the transaction", "COMMIT").await?)
}

/// Restores the triggers' state of the primary, in a database that is to become one.
pub async fn wake(inside: &LocalSession, token: i64) -> Result<(), PassError> {
    let statements = waking(inside).await?;
    if statements.is_empty() {
        return Ok(());
    }
    begin_as_holder(inside, token).await?;
    run(inside, &statements).await?;
    let forget = "DELETE FROM warm_spare.silenced; COMMIT";
    Ok(inside.batch("forgetting what was silenced", forget).await?)
}

/// Does the same in a database that nobody else uses, from the record in another one.
pub(crate) async fn wake_as_in(
    visible: &LocalSession,
    inside: &LocalSession,
) -> Result<(), PassError> {
    let statements = waking(visible).await?;
    inside.batch("beginning a transaction", "BEGIN").await?;
    run(inside, &statements).await?;
    Ok(inside.batch("ending the transaction", "COMMIT").await?)
}

/// Returns the statements that restore them. Event triggers come last.
pub(crate) async fn waking(session: &LocalSession) -> Result<Vec<String>, PassError> {
    let doing = "reading which triggers are silenced";
    let sql = "SELECT to_regclass('warm_spare.silenced') IS NOT NULL";
    if !session.query_one(doing, sql, &[]).await?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let sql = "SELECT wake FROM warm_spare.silenced ORDER BY place DESC, named";
    let rows = session.query(doing, sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Runs the statements. A trigger that does not exist any more must not prevent a promotion.
async fn run(session: &LocalSession, statements: &[String]) -> Result<(), DatastoreError> {
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

/// Begins a transaction. A process that was paused, and lost the lock in the meantime, finds a
/// later token at the recovery point.
async fn begin_as_holder(session: &LocalSession, token: i64) -> Result<(), PassError> {
    let doing = "checking our token";
    session.batch(doing, "BEGIN").await?;
    let sql = "UPDATE warm_spare.recovery_point SET token = $1 WHERE token <= $1";
    if session.execute(doing, sql, &[&token]).await? == 0 {
        session.batch(doing, "ROLLBACK").await?;
        return Err(StateError::Superseded.into());
    }
    Ok(())
}

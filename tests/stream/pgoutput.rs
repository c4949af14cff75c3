//! What a real server sends for each kind of change, and what we read of it.

use bytes::Bytes;
use chrono::Utc;
use support::{Postgres, Result};
use tokio_postgres::Client;
use warm_spare::domain::Lsn;
use warm_spare::replication::stream::pgoutput::{
    Begin, Commit, DecodeError, Delete, Identity, Insert, Message, Old, Relation, Truncate, Update,
    Value, decode,
};

const TABLES: &str = "
CREATE TYPE member_role AS ENUM ('member', 'owner');
CREATE TABLE keyed (id int8 PRIMARY KEY, name varchar(50), large text, role member_role);
CREATE TABLE keyless (a text, large text, c int4[]);
ALTER TABLE keyed ALTER large SET STORAGE EXTERNAL;
ALTER TABLE keyless ALTER large SET STORAGE EXTERNAL;
ALTER TABLE keyless REPLICA IDENTITY FULL;
CREATE TABLE indexed (a int4, b text NOT NULL, made text GENERATED ALWAYS AS (b || '!') STORED);
CREATE UNIQUE INDEX by_b ON indexed (b);
ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_b;
CREATE TABLE unchangeable (a int4);
ALTER TABLE unchangeable REPLICA IDENTITY NOTHING;
CREATE PUBLICATION p FOR TABLE keyed, keyless, indexed, unchangeable WITH (publish = 'insert, update, delete, truncate');";

struct Primary {
    client: Client,
    _server: Postgres,
}

impl Primary {
    async fn start() -> Result<Self> {
        let server = Postgres::builder().logical().start().await?;
        server.create_database("builder").await?;
        let client = server.conn("builder").await?;
        client.batch_execute(TABLES).await?;
        client
            .batch_execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
            .await?;
        Ok(Self {
            client,
            _server: server,
        })
    }

    /// Runs the statements in one transaction; everything that was sent since the last time.
    async fn sent_for(&self, sql: &str) -> Result<Vec<Message>> {
        self.client.batch_execute(sql).await?;
        let sql = "SELECT data FROM pg_logical_slot_get_binary_changes('s', NULL, NULL, \
                   'proto_version', '1', 'publication_names', 'p', 'messages', 'true')";
        let rows = self.client.query(sql, &[]).await?;
        let decoded: Result<Vec<Message>, DecodeError> = rows
            .iter()
            .map(|row| decode(Bytes::copy_from_slice(row.get(0))))
            .collect();
        Ok(decoded?)
    }

    /// The same without Begin, Commit, Relation and Type: what happened to rows.
    async fn changes_of(&self, sql: &str) -> Result<Vec<Message>> {
        let mut sent = self.sent_for(sql).await?;
        assert!(
            matches!(sent.first(), Some(Message::Begin(_))),
            "{sql}: {sent:?}"
        );
        assert!(
            matches!(sent.last(), Some(Message::Commit(_))),
            "{sql}: {sent:?}"
        );
        sent.retain(|message| {
            !matches!(
                message,
                Message::Begin(_) | Message::Commit(_) | Message::Relation(_) | Message::Type(_)
            )
        });
        Ok(sent)
    }

    async fn oid(&self, table: &str) -> Result<u32> {
        let row = self
            .client
            .query_one("SELECT $1::text::regclass::oid", &[&table])
            .await?;
        Ok(row.get(0))
    }
}

fn text(value: &str) -> Value {
    Value::Text(Bytes::copy_from_slice(value.as_bytes()))
}

fn columns(relation: &Relation) -> Vec<(&str, bool)> {
    relation
        .columns
        .iter()
        .map(|column| (column.name.as_str(), column.key))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_and_its_tables_are_told_in_full() -> Result<()> {
    let primary = Primary::start().await?;
    let before: String = primary
        .client
        .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
        .await?
        .get(0);
    let started = Utc::now();
    let sent = primary
        .sent_for(
            "BEGIN; INSERT INTO keyed VALUES (1, 'it''s', NULL, 'owner'); \
             INSERT INTO keyless VALUES ('', NULL, '{1,NULL}'); INSERT INTO indexed VALUES (1, 'b'); \
             INSERT INTO unchangeable VALUES (7); COMMIT",
        )
        .await?;
    let (
        Some(Message::Begin(Begin {
            final_lsn,
            time,
            xid,
        })),
        Some(Message::Commit(commit)),
    ) = (sent.first(), sent.last())
    else {
        panic!("no whole transaction: {sent:?}");
    };
    let Commit { lsn, end, .. } = commit;
    assert!(*xid > 0 && final_lsn == lsn && lsn < end && *lsn > before.parse::<Lsn>()?);
    assert_eq!(*time, commit.time);
    let age = *time - started;
    assert!(age.num_seconds().abs() < 60, "{age}");

    let relations: Vec<&Relation> = sent
        .iter()
        .filter_map(|message| match message {
            Message::Relation(relation) => Some(relation),
            _ => None,
        })
        .collect();
    let told: Vec<(&str, &str, Identity)> = relations
        .iter()
        .map(|r| (r.schema.as_str(), r.name.as_str(), r.identity))
        .collect();
    assert_eq!(
        told,
        [
            ("public", "keyed", Identity::Default),
            ("public", "keyless", Identity::Full),
            ("public", "indexed", Identity::Index),
            ("public", "unchangeable", Identity::Nothing),
        ]
    );
    assert_eq!(relations[0].id, primary.oid("keyed").await?);
    assert_eq!(
        columns(relations[0]),
        [
            ("id", true),
            ("name", false),
            ("large", false),
            ("role", false)
        ]
    );
    assert_eq!(relations[0].columns[1].modifier, 54, "varchar(50)");
    assert_eq!(relations[0].columns[0].type_oid, 20, "int8");
    assert_eq!(
        columns(relations[1]),
        [("a", true), ("large", true), ("c", true)]
    );
    // A generated column is not sent.
    assert_eq!(columns(relations[2]), [("a", false), ("b", true)]);

    let types: Vec<&Message> = sent
        .iter()
        .filter(|message| matches!(message, Message::Type(_)))
        .collect();
    let [Message::Type(role)] = types[..] else {
        panic!("one type that is not built in: {types:?}");
    };
    assert_eq!(
        (role.schema.as_str(), role.name.as_str()),
        ("public", "member_role")
    );
    assert_eq!(role.id, relations[0].columns[3].type_oid);

    let inserts: Vec<&Insert> = sent
        .iter()
        .filter_map(|message| match message {
            Message::Insert(insert) => Some(insert),
            _ => None,
        })
        .collect();
    assert_eq!(
        inserts[0].new,
        [text("1"), text("it's"), Value::Null, text("owner")]
    );
    assert_eq!(inserts[1].new, [text(""), Value::Null, text("{1,NULL}")]);
    assert_eq!(inserts[2].new, [text("1"), text("b")]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_changed_by_key_by_index_and_by_the_whole_row() -> Result<()> {
    let primary = Primary::start().await?;
    let large = "x".repeat(10_000);
    let fill = format!(
        "INSERT INTO keyed VALUES (1, 'a', '{large}', NULL); INSERT INTO keyless VALUES ('a', '{large}', NULL); \
         INSERT INTO indexed VALUES (1, 'b')"
    );
    primary.sent_for(&fill).await?;
    let keyed = primary.oid("keyed").await?;
    let keyless = primary.oid("keyless").await?;
    let indexed = primary.oid("indexed").await?;

    // The key stays: no old row. What was not touched is not sent.
    let update = |relation, old, new| Message::Update(Update { relation, old, new });
    assert_eq!(
        primary
            .changes_of("UPDATE keyed SET name = 'b' WHERE id = 1")
            .await?,
        [update(
            keyed,
            None,
            vec![text("1"), text("b"), Value::Unchanged, Value::Null]
        )]
    );
    // The key changes: the old one is sent, and nothing else of the old row.
    let old_key = |id| Old::Key(vec![text(id), Value::Null, Value::Null, Value::Null]);
    assert_eq!(
        primary
            .changes_of("UPDATE keyed SET id = 2 WHERE id = 1")
            .await?,
        [update(
            keyed,
            Some(old_key("1")),
            vec![text("2"), text("b"), Value::Unchanged, Value::Null]
        )]
    );
    assert_eq!(
        primary.changes_of("DELETE FROM keyed").await?,
        [Message::Delete(Delete {
            relation: keyed,
            old: old_key("2"),
        })]
    );

    // The whole old row holds the large value; the new one says that it stayed.
    let old = |a| Old::Full(vec![text(a), text(&large), Value::Null]);
    assert_eq!(
        primary.changes_of("UPDATE keyless SET a = 'b'").await?,
        [update(
            keyless,
            Some(old("a")),
            vec![text("b"), Value::Unchanged, Value::Null]
        )]
    );
    assert_eq!(
        primary.changes_of("DELETE FROM keyless").await?,
        [Message::Delete(Delete {
            relation: keyless,
            old: old("b"),
        })]
    );

    let old_index = |b| Old::Key(vec![Value::Null, text(b)]);
    assert_eq!(
        primary.changes_of("UPDATE indexed SET b = 'c'").await?,
        [update(
            indexed,
            Some(old_index("b")),
            vec![text("1"), text("c")]
        )]
    );
    assert_eq!(
        primary.changes_of("DELETE FROM indexed").await?,
        [Message::Delete(Delete {
            relation: indexed,
            old: old_index("c"),
        })]
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn truncation_messages_and_origins_are_read() -> Result<()> {
    let primary = Primary::start().await?;
    let (keyed, keyless) = (primary.oid("keyed").await?, primary.oid("keyless").await?);
    for (sql, relations, cascade, restart_identity) in [
        ("TRUNCATE keyed", vec![keyed], false, false),
        (
            "TRUNCATE keyed, keyless RESTART IDENTITY CASCADE",
            vec![keyed, keyless],
            true,
            true,
        ),
    ] {
        let expected = Message::Truncate(Truncate {
            relations,
            cascade,
            restart_identity,
        });
        assert_eq!(primary.changes_of(sql).await?, [expected], "{sql}");
    }

    let sent = primary
        .sent_for("SELECT pg_logical_emit_message(true, 'warm_spare', 'drain ü')")
        .await?;
    let [
        Message::Begin(_),
        Message::Logical(inside),
        Message::Commit(_),
    ] = &sent[..]
    else {
        panic!("one message in a transaction: {sent:?}");
    };
    assert!(inside.transactional && inside.prefix == "warm_spare");
    assert_eq!(inside.content, "drain ü".as_bytes());
    // Outside of transactions nothing flushes it: a server before 17 sends it when something else is committed.
    let sent = primary
        .sent_for(
            "SELECT pg_logical_emit_message(false, 'warm_spare', ''::bytea); \
             SELECT pg_logical_emit_message(true, 'warm_spare', 'after')",
        )
        .await?;
    let [
        Message::Logical(outside),
        Message::Begin(_),
        Message::Logical(_),
        Message::Commit(_),
    ] = &sent[..]
    else {
        panic!("one message alone, one in a transaction: {sent:?}");
    };
    assert!(!outside.transactional && outside.content.is_empty());
    assert!(outside.lsn > inside.lsn);

    // The session stands for another server when it commits.
    let stand_in = "SELECT pg_replication_origin_create('elsewhere'); SELECT pg_replication_origin_session_setup('elsewhere')";
    primary.client.batch_execute(stand_in).await?;
    let sent = primary
        .sent_for("INSERT INTO keyed VALUES (3, NULL, NULL, NULL)")
        .await?;
    assert!(
        sent.iter()
            .any(|message| matches!(message, Message::Origin(o) if o.name == "elsewhere")),
        "{sent:?}"
    );
    Ok(())
}

/// A table that is altered is told anew before its next row, and so is one whose columns have odd names.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_table_is_told_again() -> Result<()> {
    let primary = Primary::start().await?;
    let row = "INSERT INTO keyless VALUES ('a', 'b', NULL)";
    let relation = |sent: &[Message]| {
        sent.iter().find_map(|message| match message {
            Message::Relation(relation) => Some(relation.clone()),
            _ => None,
        })
    };
    let first = relation(&primary.sent_for(row).await?).expect("told at first");
    assert_eq!(first.columns.len(), 3);
    primary
        .client
        .batch_execute(
            "ALTER TABLE keyless DROP COLUMN large; ALTER TABLE keyless ADD \"Ein \"\"Name\" text",
        )
        .await?;
    let sent = primary
        .sent_for("INSERT INTO keyless VALUES ('a', NULL, 'x')")
        .await?;
    let second = relation(&sent).expect("told again");
    assert_eq!(second.id, first.id);
    assert_eq!(
        columns(&second),
        [("a", true), ("c", true), ("Ein \"Name", true)]
    );
    Ok(())
}

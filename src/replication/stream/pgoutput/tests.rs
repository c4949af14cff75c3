//! An encoder of our own for testing the decoder; tests with a real server are in
//! `tests/stream/pgoutput.rs`.

use super::reader::EPOCH;
use super::*;
use bytes::BufMut;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Writes a message as the server does.
fn encode(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    match message {
        Message::Begin(m) => {
            out.put_u8(b'B');
            out.put_u64(m.final_lsn.0);
            out.put_i64(m.time.timestamp_micros() - EPOCH);
            out.put_u32(m.xid);
        }
        Message::Commit(m) => {
            out.put_slice(b"C\0");
            out.put_u64(m.lsn.0);
            out.put_u64(m.end.0);
            out.put_i64(m.time.timestamp_micros() - EPOCH);
        }
        Message::Relation(m) => put_relation(&mut out, m),
        Message::Type(m) => {
            out.put_u8(b'Y');
            out.put_u32(m.id);
            put_schema(&mut out, &m.schema);
            put_text(&mut out, &m.name);
        }
        Message::Origin(m) => {
            out.put_u8(b'O');
            out.put_u64(m.lsn.0);
            put_text(&mut out, &m.name);
        }
        Message::Logical(m) => {
            out.put_slice(&[b'M', u8::from(m.transactional)]);
            out.put_u64(m.lsn.0);
            put_text(&mut out, &m.prefix);
            out.put_u32(m.content.len() as u32);
            out.put_slice(&m.content);
        }
        Message::Insert(m) => {
            out.put_u8(b'I');
            out.put_u32(m.relation);
            put_row(&mut out, b'N', &m.new);
        }
        Message::Update(m) => {
            out.put_u8(b'U');
            out.put_u32(m.relation);
            m.old.iter().for_each(|old| put_old(&mut out, old));
            put_row(&mut out, b'N', &m.new);
        }
        Message::Delete(m) => {
            out.put_u8(b'D');
            out.put_u32(m.relation);
            put_old(&mut out, &m.old);
        }
        Message::Truncate(m) => {
            out.put_u8(b'T');
            out.put_u32(m.relations.len() as u32);
            out.put_u8(u8::from(m.cascade) | u8::from(m.restart_identity) << 1);
            m.relations.iter().for_each(|id| out.put_u32(*id));
        }
    }
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

fn put_schema(out: &mut Vec<u8>, schema: &str) {
    put_text(out, if schema == "pg_catalog" { "" } else { schema });
}

fn put_relation(out: &mut Vec<u8>, m: &Relation) {
    out.put_u8(b'R');
    out.put_u32(m.id);
    put_schema(out, &m.schema);
    put_text(out, &m.name);
    out.put_u8(match m.identity {
        Identity::Default => b'd',
        Identity::Nothing => b'n',
        Identity::Full => b'f',
        Identity::Index => b'i',
    });
    out.put_u16(m.columns.len() as u16);
    for column in &m.columns {
        out.put_u8(u8::from(column.key));
        put_text(out, &column.name);
        out.put_u32(column.type_oid);
        out.put_i32(column.modifier);
    }
}

fn put_old(out: &mut Vec<u8>, old: &Old) {
    match old {
        Old::Key(row) => put_row(out, b'K', row),
        Old::Full(row) => put_row(out, b'O', row),
    }
}

fn put_row(out: &mut Vec<u8>, kind: u8, row: &[Value]) {
    out.put_u8(kind);
    out.put_u16(row.len() as u16);
    for value in row {
        match value {
            Value::Null => out.put_u8(b'n'),
            Value::Unchanged => out.put_u8(b'u'),
            Value::Text(bytes) => {
                out.put_u8(b't');
                out.put_u32(bytes.len() as u32);
                out.put_slice(bytes);
            }
        }
    }
}

fn text(value: &str) -> Value {
    Value::Text(Bytes::copy_from_slice(value.as_bytes()))
}

fn relation_of(identity: Identity, columns: u32) -> Relation {
    Relation {
        id: 16_385,
        schema: "public".into(),
        name: "Pakete mit ü".into(),
        identity,
        columns: (0..columns)
            .map(|number| Column {
                key: number % 2 == 0,
                name: format!("column {number}"),
                type_oid: 25 + number,
                modifier: -1 - number.cast_signed(),
            })
            .collect(),
    }
}

/// One message of each kind, and of each of its forms.
fn samples() -> Vec<Message> {
    let time = |micros| DateTime::from_timestamp_micros(micros).expect("a time");
    let row = || vec![Value::Null, text("it's"), Value::Unchanged, text("")];
    let mut samples = vec![
        Message::Begin(Begin {
            final_lsn: Lsn(0x16_B374_D848),
            time: time(1_756_000_000_123_456),
            xid: u32::MAX,
        }),
        Message::Commit(Commit {
            lsn: Lsn(1),
            end: Lsn(u64::MAX),
            time: time(0),
        }),
        Message::Type(TypeName {
            id: 16_400,
            schema: "pg_catalog".into(),
            name: "origin_member_role".into(),
        }),
        Message::Origin(Origin {
            lsn: Lsn(7),
            name: "pg_16389".into(),
        }),
        Message::Insert(Insert {
            relation: 1,
            new: Vec::new(),
        }),
        Message::Insert(Insert {
            relation: 2,
            new: row(),
        }),
        Message::Truncate(Truncate {
            relations: Vec::new(),
            cascade: false,
            restart_identity: false,
        }),
        Message::Truncate(Truncate {
            relations: vec![1, 2, u32::MAX],
            cascade: true,
            restart_identity: true,
        }),
    ];
    for (identity, columns) in [
        (Identity::Default, 3),
        (Identity::Nothing, 0),
        (Identity::Full, 1),
        (Identity::Index, 26),
    ] {
        samples.push(Message::Relation(relation_of(identity, columns)));
    }
    for transactional in [false, true] {
        samples.push(Message::Logical(Logical {
            transactional,
            lsn: Lsn(9),
            prefix: "warm_spare".into(),
            content: Bytes::from_static(b"drain \0\xff"),
        }));
    }
    for old in [None, Some(Old::Key(row())), Some(Old::Full(row()))] {
        samples.extend(old.clone().map(|old| {
            Message::Delete(Delete {
                relation: 4711,
                old,
            })
        }));
        samples.push(Message::Update(Update {
            relation: 4711,
            old,
            new: row(),
        }));
    }
    samples
}

#[test]
fn every_message_comes_back_as_it_was_sent() {
    for message in samples() {
        let frame = Bytes::from(encode(&message));
        assert_eq!(decode(frame), Ok(message));
    }
}

#[test]
fn values_are_slices_of_the_frame() {
    let frame = Bytes::from(encode(&Message::Insert(Insert {
        relation: 1,
        new: vec![text("a large value")],
    })));
    let inside = frame.as_ptr_range();
    let Ok(Message::Insert(insert)) = decode(frame.clone()) else {
        panic!("an Insert");
    };
    let Value::Text(value) = &insert.new[0] else {
        panic!("a text");
    };
    assert!(inside.contains(&value.as_ptr()));
}

#[test]
fn a_frame_that_ends_early_or_late_is_an_error() {
    for message in samples() {
        let whole = encode(&message);
        for length in 0..whole.len() {
            let error = decode(Bytes::copy_from_slice(&whole[..length]));
            assert!(error.is_err(), "{message:?} cut to {length}: {error:?}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        let error = decode(longer.into()).expect_err("a byte too much");
        assert_eq!(error.offset, whole.len());
    }
}

fn problem(frame: &[u8]) -> String {
    decode(Bytes::copy_from_slice(frame))
        .expect_err("it is wrong")
        .to_string()
}

#[test]
fn errors_name_the_message_and_the_place() {
    for (frame, said) in [
        (
            &b""[..],
            "pgoutput message ?, byte 0: 1 bytes expected, 0 left",
        ),
        (
            b"S",
            "pgoutput message ?, byte 0: unknown kind of message 'S'",
        ),
        (
            b"C\x01",
            "pgoutput message Commit, byte 1: unknown flags 0x01",
        ),
        (
            b"I\0\0\0\x01N\0\x01b\0\0\0\0",
            "pgoutput message Insert, byte 8: unknown kind of value 'b'",
        ),
        (
            b"U\0\0\0\x01K\0\0K\0\0",
            "pgoutput message Update, byte 8: unknown kind of row 'K'",
        ),
        (
            b"D\0\0\0\x01N\0\0",
            "pgoutput message Delete, byte 5: unknown kind of row 'N'",
        ),
        (
            b"R\0\0\0\x01a\0b\0x\0\0",
            "pgoutput message Relation, byte 9: unknown replica identity 'x'",
        ),
        (
            b"R\0\0\0\x01a\0b\0d\0\x01\x02c\0\0\0\0\0\0\0\0\0",
            "pgoutput message Relation, byte 12: unknown flags 0x02",
        ),
        (
            b"Y\0\0\0\x01\xff\0b\0",
            "pgoutput message Type, byte 5: a text that is not UTF-8",
        ),
        (
            b"O\0\0\0\0\0\0\0\0never ends",
            "pgoutput message Origin, byte 9: a text without an end",
        ),
        (
            b"T\0\0\0\x01\x04\0\0\0\x01",
            "pgoutput message Truncate, byte 5: unknown flags 0x04",
        ),
        (
            b"T\x7f\xff\xff\xff\0\0\0\0\x01",
            "pgoutput message Truncate, byte 6: 2147483647 items expected, 4 bytes left",
        ),
        (
            b"I\0\0\0\x01N\xff\xffn",
            "pgoutput message Insert, byte 8: 65535 items expected, 1 bytes left",
        ),
        (
            b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff",
            "pgoutput message Insert, byte 13: 4294967295 bytes expected, 0 left",
        ),
    ] {
        assert_eq!(problem(frame), said);
    }
}

#[test]
fn no_time_is_too_strange() {
    for micros in [
        i64::MIN,
        i64::MIN + 1,
        -1,
        0,
        1,
        i64::MAX - EPOCH,
        i64::MAX - EPOCH + 1,
        i64::MAX,
    ] {
        let mut frame = vec![b'B'];
        frame.put_u64(1);
        frame.put_i64(micros);
        frame.put_u32(1);
        match decode(frame.into()) {
            Ok(Message::Begin(begin)) => {
                assert_eq!(begin.time.timestamp_micros(), micros + EPOCH);
            }
            Err(error) => assert_eq!(
                (error.message, error.offset),
                ("Begin", 9),
                "{micros}: {error}"
            ),
            Ok(other) => panic!("{other:?}"),
        }
    }
}

/// Bytes that a message's lists and texts take; those of its values are the frame's own.
fn held(message: &Message) -> usize {
    let row = |row: &Vec<Value>| row.capacity() * size_of::<Value>();
    let old = |old: &Old| match old {
        Old::Key(values) | Old::Full(values) => row(values),
    };
    match message {
        Message::Begin(_) | Message::Commit(_) => 0,
        Message::Relation(m) => {
            let names: usize = m.columns.iter().map(|c| c.name.capacity()).sum();
            let list = m.columns.capacity() * size_of::<Column>();
            m.schema.capacity() + m.name.capacity() + names + list
        }
        Message::Type(m) => m.schema.capacity() + m.name.capacity(),
        Message::Origin(m) => m.name.capacity(),
        Message::Logical(m) => m.prefix.capacity(),
        Message::Insert(m) => row(&m.new),
        Message::Update(m) => row(&m.new) + m.old.as_ref().map_or(0, old),
        Message::Delete(m) => old(&m.old),
        Message::Truncate(m) => m.relations.capacity() * size_of::<u32>(),
    }
}

/// Changes a frame at random: bytes, a piece out, a piece twice, an end.
fn mutate(frame: &mut Vec<u8>, random: &mut StdRng) {
    for _ in 0..random.random_range(1..4) {
        if frame.is_empty() {
            return;
        }
        let at = random.random_range(0..frame.len());
        let to = random.random_range(at..=frame.len().min(at + 8));
        match random.random_range(0..6) {
            0 | 1 => frame[at] = random.random(),
            2 => frame[at] ^= 1 << random.random_range(0..8),
            3 => drop(frame.drain(at..to)),
            4 => frame.splice(at..at, frame[at..to].to_vec()).for_each(drop),
            _ => frame.truncate(at),
        }
    }
}

#[test]
fn no_frame_panics_or_costs_more_than_it_is_long() {
    let seed = match std::env::var("WARM_SPARE_SEED") {
        Ok(text) => text.parse().expect("WARM_SPARE_SEED is a number"),
        Err(_) => rand::random::<u32>().into(),
    };
    println!("WARM_SPARE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let frames: Vec<Vec<u8>> = samples().iter().map(encode).collect();
    let (mut good, mut bad) = (0, 0);
    for _ in 0..50_000 {
        let mut frame = frames[random.random_range(0..frames.len())].clone();
        mutate(&mut frame, &mut random);
        let length = frame.len();
        match decode(frame.clone().into()) {
            Ok(message) => {
                good += 1;
                // The longest item for its bytes: a value of one byte.
                let most = 64 + length * size_of::<Value>();
                assert!(held(&message) <= most, "{frame:?}");
                assert_eq!(encode(&message).len(), length, "{message:?}");
            }
            Err(error) => {
                bad += 1;
                assert!(error.offset <= length, "{frame:?}: {error}");
            }
        }
    }
    assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad");
}

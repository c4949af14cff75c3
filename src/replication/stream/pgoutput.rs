//! Decodes the primary's messages: `pgoutput`, protocol version 1, values as text.
//!
//! Nothing unknown is ignored: a byte that is not understood may be a change that the spare would
//! miss.

mod reader;
#[cfg(test)]
mod tests;

use crate::domain::Lsn;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use reader::Reader;

#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Begin(Begin),
    Commit(Commit),
    Relation(Relation),
    Type(TypeName),
    Origin(Origin),
    Logical(Logical),
    Insert(Insert),
    Update(Update),
    Delete(Delete),
    Truncate(Truncate),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Begin {
    /// Where the commit record begins: [`Commit::lsn`].
    pub final_lsn: Lsn,
    pub time: DateTime<Utc>,
    pub xid: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Where the commit record begins.
    pub lsn: Lsn,
    /// Position at which the transaction ends: a stream requested from here begins with the next
    /// transaction.
    pub end: Lsn,
    pub time: DateTime<Utc>,
}

/// A table as it is when its rows are sent. It is sent again after every change of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Relation {
    pub id: u32,
    pub schema: String,
    pub name: String,
    pub identity: Identity,
    pub columns: Vec<Column>,
}

/// The columns that identify the old row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The primary key, if there is one.
    Default,
    Nothing,
    /// The whole row.
    Full,
    /// A unique index that was chosen for it.
    Index,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// True: the column is part of the old row's identity; with [`Identity::Full`] every column is.
    pub key: bool,
    pub name: String,
    pub type_oid: u32,
    pub modifier: i32,
}

/// A type that is not built in, sent before the relation that uses it.
#[derive(Debug, Clone, PartialEq)]
pub struct TypeName {
    pub id: u32,
    pub schema: String,
    pub name: String,
}

/// The origin of a transaction that came to the primary by replication from another server.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    pub lsn: Lsn,
    pub name: String,
}

/// A message written by `pg_logical_emit_message`. A message that is not transactional is sent
/// outside of Begin and Commit.
#[derive(Debug, Clone, PartialEq)]
pub struct Logical {
    pub transactional: bool,
    pub lsn: Lsn,
    pub prefix: String,
    pub content: Bytes,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Insert {
    pub relation: u32,
    pub new: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    pub relation: u32,
    /// None: the key is the new row's.
    pub old: Option<Old>,
    pub new: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Delete {
    pub relation: u32,
    pub old: Old,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Truncate {
    pub relations: Vec<u32>,
    pub cascade: bool,
    pub restart_identity: bool,
}

/// The row before the change; one value for each column of the relation.
#[derive(Debug, Clone, PartialEq)]
pub enum Old {
    /// Only the key's columns count; the others are sent as Null.
    Key(Vec<Value>),
    Full(Vec<Value>),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    /// A large value that the change did not touch, and that the server therefore did not read.
    Unchanged,
    /// A slice of the frame.
    Text(Bytes),
}

/// The primary sent bytes that this program does not understand: the change in them is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pgoutput message {message}, byte {offset}: {problem}")]
pub struct DecodeError {
    /// `Insert`, `Relation` …; `?` if the kind itself is unknown.
    pub message: &'static str,
    pub offset: usize,
    pub problem: String,
}

/// Reads one message. The frame is the content of an XLogData message of the replication protocol.
pub fn decode(frame: Bytes) -> Result<Message, DecodeError> {
    let mut reader = Reader::new(frame);
    let kind = reader.u8()?;
    reader.message = match kind {
        b'B' => "Begin",
        b'C' => "Commit",
        b'R' => "Relation",
        b'Y' => "Type",
        b'O' => "Origin",
        b'M' => "Logical",
        b'I' => "Insert",
        b'U' => "Update",
        b'D' => "Delete",
        b'T' => "Truncate",
        _ => return Err(reader.unknown("kind of message", kind)),
    };
    let message = match kind {
        b'B' => Message::Begin(begin(&mut reader)?),
        b'C' => Message::Commit(commit(&mut reader)?),
        b'R' => Message::Relation(relation(&mut reader)?),
        b'Y' => Message::Type(type_name(&mut reader)?),
        b'O' => Message::Origin(Origin {
            lsn: reader.lsn()?,
            name: reader.string()?,
        }),
        b'M' => Message::Logical(logical(&mut reader)?),
        b'I' => Message::Insert(insert(&mut reader)?),
        b'U' => Message::Update(update(&mut reader)?),
        b'D' => Message::Delete(delete(&mut reader)?),
        _ => Message::Truncate(truncate(&mut reader)?),
    };
    match reader.left() {
        0 => Ok(message),
        left => Err(reader.error(format!(
            "{left} bytes are left after the end of the message"
        ))),
    }
}

fn begin(reader: &mut Reader) -> Result<Begin, DecodeError> {
    Ok(Begin {
        final_lsn: reader.lsn()?,
        time: reader.time()?,
        xid: reader.u32()?,
    })
}

fn commit(reader: &mut Reader) -> Result<Commit, DecodeError> {
    reader.flags(0)?;
    Ok(Commit {
        lsn: reader.lsn()?,
        end: reader.lsn()?,
        time: reader.time()?,
    })
}

fn relation(reader: &mut Reader) -> Result<Relation, DecodeError> {
    let id = reader.u32()?;
    let schema = reader.schema()?;
    let name = reader.string()?;
    let identity = match reader.u8()? {
        b'd' => Identity::Default,
        b'n' => Identity::Nothing,
        b'f' => Identity::Full,
        b'i' => Identity::Index,
        other => return Err(reader.unknown("replica identity", other)),
    };
    // Every column has a flag, a name that may be empty, and two numbers.
    let number = usize::from(reader.u16()?);
    let mut columns = reader.room_for(number, 10)?;
    for _ in 0..number {
        columns.push(Column {
            key: reader.flags(1)? == 1,
            name: reader.string()?,
            type_oid: reader.u32()?,
            modifier: reader.u32()?.cast_signed(),
        });
    }
    Ok(Relation {
        id,
        schema,
        name,
        identity,
        columns,
    })
}

fn type_name(reader: &mut Reader) -> Result<TypeName, DecodeError> {
    Ok(TypeName {
        id: reader.u32()?,
        schema: reader.schema()?,
        name: reader.string()?,
    })
}

fn logical(reader: &mut Reader) -> Result<Logical, DecodeError> {
    Ok(Logical {
        transactional: reader.flags(1)? == 1,
        lsn: reader.lsn()?,
        prefix: reader.string()?,
        content: reader.counted()?,
    })
}

fn insert(reader: &mut Reader) -> Result<Insert, DecodeError> {
    let relation = reader.u32()?;
    match reader.u8()? {
        b'N' => Ok(Insert {
            relation,
            new: reader.row()?,
        }),
        other => Err(reader.unknown("kind of row", other)),
    }
}

fn update(reader: &mut Reader) -> Result<Update, DecodeError> {
    let relation = reader.u32()?;
    let mut kind = reader.u8()?;
    let old = match kind {
        b'K' => Some(Old::Key(reader.row()?)),
        b'O' => Some(Old::Full(reader.row()?)),
        _ => None,
    };
    if old.is_some() {
        kind = reader.u8()?;
    }
    match kind {
        b'N' => Ok(Update {
            relation,
            old,
            new: reader.row()?,
        }),
        other => Err(reader.unknown("kind of row", other)),
    }
}

fn delete(reader: &mut Reader) -> Result<Delete, DecodeError> {
    let relation = reader.u32()?;
    let old = match reader.u8()? {
        b'K' => Old::Key(reader.row()?),
        b'O' => Old::Full(reader.row()?),
        other => return Err(reader.unknown("kind of row", other)),
    };
    Ok(Delete { relation, old })
}

fn truncate(reader: &mut Reader) -> Result<Truncate, DecodeError> {
    let number = reader.u32()? as usize;
    let options = reader.flags(3)?;
    let mut relations = reader.room_for(number, 4)?;
    for _ in 0..number {
        relations.push(reader.u32()?);
    }
    Ok(Truncate {
        relations,
        cascade: options & 1 != 0,
        restart_identity: options & 2 != 0,
    })
}

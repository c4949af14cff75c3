//! Domain words in columns of type `text`.

use crate::domain::{DivergedClass, MissingReason, PromotionKind, Role, Step, TransitionKind};
use bytes::BytesMut;
use std::error::Error;
use strum::VariantArray;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

type Boxed = Box<dyn Error + Sync + Send>;

/// Returns the error for an unknown word; never a panic, because a newer program may have written
/// it.
fn unknown<W: VariantArray + ToString>(found: &str, list: &str) -> Boxed {
    let known: Vec<String> = W::VARIANTS.iter().map(ToString::to_string).collect();
    format!("unknown {list} {found:?} (known: {})", known.join(", ")).into()
}

macro_rules! text_column {
    ($($word:ty),+) => {$(
        impl<'a> FromSql<'a> for $word {
            fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Boxed> {
                let found = <&str>::from_sql(ty, raw)?;
                found.parse().map_err(|_| unknown::<$word>(found, stringify!($word)))
            }

            fn accepts(ty: &Type) -> bool {
                <&str as FromSql>::accepts(ty)
            }
        }

        impl ToSql for $word {
            fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Boxed> {
                self.into_str().to_sql(ty, out)
            }

            fn accepts(ty: &Type) -> bool {
                <&str as ToSql>::accepts(ty)
            }

            to_sql_checked!();
        }
    )+};
}

text_column!(
    Role,
    PromotionKind,
    TransitionKind,
    Step,
    MissingReason,
    DivergedClass
);

//! Unit tests of `channel.rs`.

use super::*;

fn message(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// One byte at a time as well: a message may be cut anywhere.
#[track_caller]
fn refused(bytes: &[u8], private: bool) -> Option<String> {
    let whole = Watched::new((), private).see(bytes);
    let mut watched = Watched::new((), private);
    let singly = bytes.iter().try_for_each(|byte| watched.see(&[*byte]));
    let text = |result: io::Result<()>| result.err().map(|error| error.to_string());
    let (whole, singly) = (text(whole), text(singly));
    assert_eq!(whole, singly);
    whole
}

#[test]
fn a_password_goes_in_clear_only_over_a_private_channel() {
    let asked = message(b'R', 8, &3_u32.to_be_bytes());
    assert_eq!(refused(&asked, false).as_deref(), Some(CLEARTEXT_REFUSED));
    assert_eq!(refused(&asked, true), None);
    // Behind a notice, and behind a request for another way.
    let mut later = message(b'N', 5, b"\0");
    later.extend(message(b'R', 12, b"\0\0\0\x05salt"));
    assert_eq!(refused(&later, false), None);
    later.extend(asked);
    assert!(refused(&later, false).is_some());
}

#[test]
fn no_message_is_longer_than_a_server_sends() {
    let login = message(b'R', 8, &0_u32.to_be_bytes());
    for length in [0, 3, MESSAGE_MAX_BEFORE_LOGIN + 1, u32::MAX] {
        let text = refused(&message(b'E', length, b""), false);
        assert!(text.is_some_and(|text| text.starts_with(MALFORMED)));
    }
    for length in [0, 3, MESSAGE_MAX + 1, u32::MAX] {
        let stream = [login.clone(), message(b'd', length, b"")].concat();
        assert!(refused(&stream, false).is_some(), "{length}");
    }
    let stream = [login, message(b'd', MESSAGE_MAX, b"and so on")].concat();
    assert_eq!(refused(&stream, false), None);
}

#[test]
fn a_server_does_not_keep_us_hashing_for_hours() {
    let scram = |rounds: &str| {
        let text = format!("r=abc,s=c2FsdA==,i={rounds}");
        let body = [&11_u32.to_be_bytes(), text.as_bytes()].concat();
        message(b'R', 4 + body.len() as u32, &body)
    };
    assert_eq!(refused(&scram("4096"), false), None);
    for rounds in ["1000001", "4294967295", "99999999999999999999", "-1", ""] {
        assert!(refused(&scram(rounds), false).is_some(), "{rounds}");
    }
}

#[test]
fn the_client_is_not_sent_to_ask_for_types_without_end() {
    let columns = |oid: u32| {
        let body = [
            &1_u16.to_be_bytes()[..],
            b"name\0",
            &[0; 6],
            &oid.to_be_bytes(),
            &[0; 8],
        ]
        .concat();
        message(b'T', 4 + body.len() as u32, &body)
    };
    let parameters = |oid: u32| {
        let body = [&1_u16.to_be_bytes()[..], &oid.to_be_bytes()].concat();
        message(b't', 4 + body.len() as u32, &body)
    };
    let login = message(b'R', 8, &0_u32.to_be_bytes());
    let seen = |bytes: &[u8], only: bool| {
        let mut watched = Watched::new((), false).with_known_types_only(only);
        watched.see(&[&login, bytes].concat()).is_ok()
    };
    for description in [columns(25), parameters(20)] {
        assert!(seen(&description, true));
    }
    for description in [columns(4_000_000_000), parameters(99_999)] {
        assert!(!seen(&description, true));
        assert!(seen(&description, false));
    }
    let cut = message(b'T', 4 + 3, b"\0\x05n");
    assert!(!seen(&cut, true));
}

#[test]
fn a_server_without_tls_is_watched_in_clear() {
    let mut watched = Watched::before_tls((), false);
    let asked = message(b'R', 8, &3_u32.to_be_bytes());
    assert!(watched.see(&[b"N".as_slice(), &asked].concat()).is_err());
    let mut watched = Watched::before_tls((), false);
    let encrypted = [b"S".as_slice(), &asked].concat();
    assert!(watched.see(&encrypted).is_ok());
}

use super::*;

/// A key and a text that it has sealed, from Habitat's and Builder's own published tests
/// (Apache-2.0).
const KNOWN: &str = "20200825205529";
const KNOWN_SECRET: &str = "M9u8wuJmZMsmVG4tNgngYJDapjIJE1RnxJAFVN97Bxs=";
const KNOWN_NONCE: &str = "ilnFU7aVNfkq6PrNXzXh3l1FTQftMzoM";
const KNOWN_CIPHERTEXT: &str = "r6B4EAUIRO2tf169nPMeDPxVzZ7tslS/Oiv2ZQCcFBRyotwv5rh0NjN6KR5pCFOPWAmp62tSQQz6FIiKqHC2bBlk3A4MLugX";

fn known_box() -> String {
    format!("BOX-1\nbldr-{KNOWN}\nbldr-{KNOWN}\n{KNOWN_NONCE}\n{KNOWN_CIPHERTEXT}")
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn put(directory: &Path, file: &str, text: &str) {
    std::fs::write(directory.join(file), text).expect("a file");
}

fn put_pair(directory: &Path, revision: &str, secret: &[u8; 32]) {
    let public = SecretKey::from_bytes(*secret).public_key();
    let line = |format: &str, key: &[u8]| {
        format!(
            "{format}\nbldr-{revision}\n\n{}\n",
            BASE64_STANDARD.encode(key)
        )
    };
    put(
        directory,
        &format!("bldr-{revision}.box.key"),
        &line(SECRET_FORMAT, secret),
    );
    put(
        directory,
        &format!("bldr-{revision}.pub"),
        &line(PUBLIC_FORMAT, public.as_bytes()),
    );
}

fn seal(revision: &str, secret: &[u8; 32], content: &[u8]) -> String {
    let secret = SecretKey::from_bytes(*secret);
    let nonce = [7; 24];
    let sealed = SalsaBox::new(&secret.public_key(), &secret).encrypt(&nonce.into(), content);
    let encode = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    let ciphertext = encode(&sealed.expect("sealed"));
    format!(
        "BOX-1\nbldr-{revision}\nbldr-{revision}\n{}\n{ciphertext}",
        encode(&nonce)
    )
}

#[test]
fn what_habitats_own_library_sealed_is_opened() {
    let dir = directory();
    let key = format!("BOX-SEC-1\nbldr-{KNOWN}\n\n{KNOWN_SECRET}");
    put(dir.path(), &format!("bldr-{KNOWN}.box.key"), &key);
    let keys = BuilderKeys::read(dir.path()).expect("keys");
    assert_eq!(keys.open(&known_box()), Ok(KNOWN.to_string()));
    let once_more = BASE64_STANDARD.encode(known_box());
    assert_eq!(keys.open(&once_more), Ok(KNOWN.to_string()));
    let token = format!("_{once_more}");
    assert_eq!(sealed_by(&token).as_deref(), Some(KNOWN));
    assert_eq!(keys.open(&token), Ok(KNOWN.to_string()));
    assert!(
        keys.flaws()[0].contains("without its .pub"),
        "{:?}",
        keys.flaws()
    );
}

#[test]
fn a_key_of_the_same_name_and_other_bytes_is_told_from_one_that_is_not_there() {
    let dir = directory();
    put_pair(dir.path(), "20250101000000", &[1; 32]);
    put_pair(dir.path(), "20260101000000", &[2; 32]);
    let keys = BuilderKeys::read(dir.path()).expect("keys");
    assert_eq!(keys.revisions(), ["20250101000000", "20260101000000"]);
    assert!(keys.flaws().is_empty());
    let good = seal("20250101000000", &[1; 32], b"a secret");
    assert_eq!(keys.open(&good), Ok("20250101000000".into()));
    let others = seal("20260101000000", &[3; 32], b"a secret");
    let revision = "20260101000000".to_string();
    assert_eq!(keys.open(&others), Err(BuilderKeyError::Wrong { revision }));
    assert!(matches!(
        keys.open(&known_box()),
        Err(BuilderKeyError::Absent { .. })
    ));
    let body = "BOX-1\nbldr-20250101000000\n\nAAAA";
    for nothing in [
        "",
        "_",
        "plain text",
        "BOX-1",
        body,
        "ANONYMOUS-BOX-1\nbldr-1\nAAAA",
    ] {
        assert_eq!(keys.open(nothing), Err(BuilderKeyError::NoBox), "{nothing}");
    }
}

#[test]
fn a_file_that_is_no_key_spoils_its_own_revision_only() {
    let dir = directory();
    put_pair(dir.path(), "20250101000000", &[1; 32]);
    put(
        dir.path(),
        "bldr-20260101000000.box.key",
        "BOX-SEC-1\nbldr-20260101000000\n\nAAAA\n",
    );
    put(
        dir.path(),
        "bldr-20270101000000.pub",
        "BOX-PUB-1\nbldr-1\n\n\n",
    );
    put(dir.path(), "bldr-yesterday.box.key", "no revision");
    put(dir.path(), "core-20250101000000.sig.key", "not Builder's");
    let keys = BuilderKeys::read(dir.path()).expect("keys");
    assert_eq!(keys.revisions(), ["20250101000000"]);
    let flaws = keys.flaws();
    assert_eq!(flaws.len(), 2, "{flaws:?}");
    assert!(
        flaws[0].contains("no 32 bytes") && flaws[1].contains("does not name"),
        "{flaws:?}"
    );
    let sealed = seal("20260101000000", &[2; 32], b"");
    assert!(matches!(
        keys.open(&sealed),
        Err(BuilderKeyError::Unusable { .. })
    ));
}

#[test]
fn halves_of_two_pairs_and_a_missing_directory_are_told() {
    let dir = directory();
    put_pair(dir.path(), "20250101000000", &[1; 32]);
    let other = SecretKey::from_bytes([2; 32]).public_key();
    let public = BASE64_STANDARD.encode(other.as_bytes());
    let text = format!("BOX-PUB-1\nbldr-20250101000000\n\n{public}");
    put(dir.path(), "bldr-20250101000000.pub", &text);
    let keys = BuilderKeys::read(dir.path()).expect("keys");
    assert!(keys.flaws()[0].contains("of two pairs"));
    let nowhere = BuilderKeys::read(Path::new("/nonexistent"));
    assert!(matches!(nowhere, Err(BuilderKeyError::Directory { .. })));
}

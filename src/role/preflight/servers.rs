//! Checks of the servers: versions, extensions, programs, disk, privileges, bucket, TLS.

use super::facts::Facts;
use super::{external, ok, refuse, unknown, warn};
use crate::cluster::{Keeps, MayApply, is_loopback, is_verified};
use crate::config;
use crate::domain::PreflightCheck;
use crate::observe::Check;
use crate::replication::ReplicationError;
use bytesize::ByteSize;

/// Free disk below this fraction (1/10) of the disk counts as low.
const LOW_DISK_DIVISOR: u64 = 10;

pub(super) fn versions(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Versions;
    let (local, peer) = match majors(facts) {
        Ok(majors) => majors,
        Err(error) => return unknown(NAME, error),
    };
    let text = format!("PostgreSQL {local} here, {peer} on the primary");
    if local < peer {
        let step = format!("upgrade the spare's datastore to PostgreSQL {peer}");
        return refuse(
            NAME,
            format!("{text}: the spare's server cannot read the primary's data"),
            step,
        );
    }
    ok(NAME, text)
}

/// Checks that the old primary could follow this cluster after the takeover: no program writes what
/// a server of an older version reads.
pub(super) fn no_way_back(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::NoWayBack;
    match majors(facts) {
        // `versions` says why.
        Err(_) => ok(
            NAME,
            "not known, because the versions of the servers are not known",
        ),
        Ok((local, peer)) if local > peer => warn(
            NAME,
            format!(
                "PostgreSQL {local} here, {peer} on the primary: the takeover is the point of no return. A server of an older version cannot follow a newer one"
            ),
            format!(
                "if you mean it, take over, and then upgrade the old primary's datastore to PostgreSQL {local}: until it follows, there is no spare (docs/upgrade-through-the-spare.md)"
            ),
        ),
        Ok(_) => ok(NAME, "the old primary's server can follow this one"),
    }
}

/// Returns the major versions of the local server and of the primary's.
fn majors<'a>(facts: &'a Facts<'_>) -> Result<(u32, u32), &'a ReplicationError> {
    let server = facts.server.as_ref()?;
    let there = facts.there.as_ref()?;
    Ok((server.major, there.server.major))
}

pub(super) fn extensions(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Extensions;
    let (missing, whose) = match (&facts.there, &facts.server) {
        (Ok(there), _) => (&there.server.missing_extensions, "the primary's database"),
        (Err(_), Ok(server)) => (&server.missing_extensions, "the local database"),
        (Err(_), Err(error)) => return unknown(NAME, error),
    };
    if missing.is_empty() {
        return ok(NAME, format!("this server has all that {whose} uses"));
    }
    let text = format!(
        "this server does not have {}, which {whose} uses",
        missing.join(", ")
    );
    refuse(
        NAME,
        text,
        "install PostgreSQL's contrib modules on the spare",
    )
}

pub(super) fn clients(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Clients;
    match &facts.clients {
        None => warn(
            NAME,
            "not known, because the local server's version is not known",
            "",
        ),
        Some(Ok(found)) => ok(
            NAME,
            format!(
                "pg_dump and pg_restore {} in {}",
                found.major,
                found.directory.display()
            ),
        ),
        Some(Err(error)) => warn(
            NAME,
            format!("{error}: this node can make no copy, which coming back needs"),
            "install PostgreSQL's client programs",
        ),
    }
}

pub(super) fn disk(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Disk;
    let server = match &facts.server {
        Ok(server) => server,
        Err(error) => return unknown(NAME, error),
    };
    let Some(disk) = &server.disk else {
        return ok(NAME, "not known: the local datastore is on another machine");
    };
    let text = format!(
        "{} free of {} in {}, and the database has {}",
        ByteSize(disk.free),
        ByteSize(disk.total),
        disk.directory,
        ByteSize(server.bytes)
    );
    if disk.free < server.bytes || disk.free < disk.total / LOW_DISK_DIVISOR {
        return warn(
            NAME,
            text,
            "make room, or lower replication.keep_generations",
        );
    }
    ok(NAME, text)
}

pub(super) fn privileges(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Privileges;
    let server = match &facts.server {
        Ok(server) => server,
        Err(error) => return unknown(NAME, error),
    };
    let (local, peer) = (&facts.config.local.datastore, &facts.config.peer.datastore);
    let mut missing = server.rights.missing(&local.database, false);
    missing.extend(server.rights.missing_to_fence());
    if facts.streams() && server.may_apply != MayApply::Yes {
        missing.push("may not set session_replication_role".into());
    }
    let mut problems: Vec<String> = missing
        .iter()
        .map(|what| format!("the local user {} {what}", local.user))
        .collect();
    if facts.is_planned() {
        let there = match &facts.there {
            Ok(there) => there.server.rights,
            Err(error) => return unknown(NAME, error),
        };
        let mut missing = there.missing(&peer.database, there.owns_state.is_none());
        missing.extend(there.missing_to_fence());
        problems.extend(
            missing
                .iter()
                .map(|what| format!("the peer's user {} {what}", peer.user)),
        );
    }
    if problems.is_empty() {
        let sides = if facts.is_planned() {
            "on both sides"
        } else {
            "here"
        };
        return ok(
            NAME,
            format!("our users have all privileges that are needed {sides}"),
        );
    }
    let step = "use Builder's own user hab, or grant the missing privileges";
    refuse(NAME, problems.join("; "), step)
}

pub(super) fn bucket(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Bucket;
    let bucket = &facts.config.local.s3.bucket_name;
    match &facts.bucket {
        // Its provider demands versions, and retention deletes nothing there.
        Ok(Some(_)) if facts.config.artifacts.mode == config::ArtifactsMode::External => {
            external::bucket(facts)
        }
        Ok(Some(Keeps::Nothing)) => ok(NAME, format!("{bucket} accepts objects, and deletes them")),
        Ok(Some(Keeps::Versions)) => warn(
            NAME,
            format!(
                "{bucket} accepts objects, but keeps a version of each object that is deleted or overwritten: objects that retention deletes free no space"
            ),
            "give the bucket a lifecycle rule that expires noncurrent versions: docs/copied.md",
        ),
        Ok(Some(Keeps::Locked)) => warn(
            NAME,
            format!(
                "{bucket} accepts objects, but its versions cannot be deleted (it has a lock, or the key does not have s3:DeleteObjectVersion): objects that retention deletes free no space, and a probe object stays"
            ),
            "use a bucket without a lock for the spare, or give it a lifecycle rule that expires noncurrent versions: docs/copied.md",
        ),
        Ok(None) if facts.config.artifacts.are_detached() => ok(
            NAME,
            format!(
                "{bucket} can be read at the peer's store; the file system comes here at the takeover"
            ),
        ),
        Ok(None) if facts.config.artifacts.mode == config::ArtifactsMode::Shared => ok(
            NAME,
            format!(
                "{bucket} can be read; artifacts.mode is shared: nothing but the lease is written"
            ),
        ),
        Ok(None) => external::bucket(facts),
        // The takeover asks for an operator's consent to the lease, or waits for the file system.
        Err(error)
            if facts.config.artifacts.mode == config::ArtifactsMode::Shared
                && !facts.is_planned() =>
        {
            warn(
                NAME,
                format!("{error}; the takeover looks at it in its step lease or attach"),
                error.next_step(),
            )
        }
        Err(error) => unknown(NAME, error),
    }
}

/// Checks that the peer proves its identity before it is believed and gets a password.
pub(super) fn tls(peer: &config::Side) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Tls;
    let mut open = Vec::new();
    let datastore = &peer.datastore;
    if !is_loopback(&datastore.host) && !is_verified(datastore) {
        open.push(format!(
            "peer.datastore.ssl_mode is {}, so any server may answer at {}",
            datastore.ssl_mode.as_str(),
            datastore.host
        ));
    }
    let plain = peer.s3.endpoint.strip_prefix("http://");
    let host = plain.map(|rest| rest.split([':', '/']).next().unwrap_or_default());
    if let Some(host) = host.filter(|host| !is_loopback(host)) {
        open.push(format!(
            "peer.s3.endpoint is http, so any server may answer at {host}"
        ));
    }
    match open.is_empty() {
        true => ok(
            NAME,
            "the peer's servers prove who they are, or are on this machine",
        ),
        false => warn(
            NAME,
            open.join("; "),
            "set peer.datastore.ssl_mode = \"verify-full\" with ssl_root_cert, and an https endpoint: docs/security.md",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Verdict;

    #[test]
    fn a_peer_that_anybody_could_be_is_warned_of() {
        let judged = |host: &str, mode: config::SslMode, endpoint: &str| {
            let secret = || config::SecretSource::Inline(config::Secret::new(String::new()));
            let peer = config::Side {
                datastore: config::Datastore {
                    host: host.into(),
                    port: 5432,
                    user: "hab".into(),
                    database: "builder".into(),
                    password: None,
                    ssl_mode: mode,
                    ssl_root_cert: None,
                    ssl_cert: None,
                    ssl_key: None,
                    source: "configuration",
                },
                s3: config::S3 {
                    backend: config::Backend::Minio,
                    endpoint: endpoint.into(),
                    region: String::new(),
                    bucket_name: "b".into(),
                    key_id: secret(),
                    secret_key: secret(),
                    ca_file: None,
                    proxy: None,
                    source: "configuration",
                },
            };
            tls(&peer).result
        };
        use config::SslMode::{Prefer, Require, VerifyCa, VerifyFull};
        let far = "https://dc1.example:9000";
        assert_eq!(
            judged("127.0.0.1", Prefer, "http://localhost:9000"),
            Verdict::Ok
        );
        assert_eq!(judged("dc1.example", VerifyFull, far), Verdict::Ok);
        assert_eq!(judged("dc1.example", VerifyCa, far), Verdict::Ok);
        assert_eq!(judged("dc1.example", Prefer, far), Verdict::Warn);
        assert_eq!(judged("10.0.0.1", Require, far), Verdict::Warn);
        assert_eq!(
            judged("dc1.example", VerifyFull, "http://dc1.example:9000"),
            Verdict::Warn
        );
    }
}

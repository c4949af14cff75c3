//! Stand-ins for the scripts of Chef's on-prem repository, and for the part of `systemctl` that they use. They do to
//! the node what the real ones were read to do, in our own words.

use super::super::Result;
use super::{DEPOT, Node, SCRIPTS};

impl Node {
    pub(super) fn write_scripts(&self) -> Result<()> {
        self.file("/usr/local/sbin/systemctl", SYSTEMCTL, 0o755)?;
        let scripts = [("uninstall.sh", UNINSTALL), ("install.sh", INSTALL)];
        for (name, text) in scripts {
            let text = text.replace("DEPOT", DEPOT);
            self.file(&format!("{SCRIPTS}/{name}"), &text, 0o755)?;
        }
        Ok(())
    }
}

/// The unit `hab-sup`, which the installer writes anew each time.
const SYSTEMCTL: &str = r#"#!/bin/bash
runs() { pgrep -x hab-launch > /dev/null; }
case "$1 $2" in
    "stop hab-sup")
        pkill -TERM -x hab-launch
        while runs; do sleep 0.1; done
        ;;
    "start hab-sup")
        runs && exit 0
        cd /
        export HAB_SUP_BINARY=/usr/bin/hab-sup HAB_LAUNCH_BINARY=/usr/bin/hab-launch
        # shellcheck disable=SC2046 # Each word is one argument.
        setsid hab sup run --no-color $(cat /etc/hab-sup.peers 2> /dev/null) >> /var/log/hab-sup.log 2>&1 < /dev/null &
        until hab svc status > /dev/null 2>&1; do sleep 0.1; done
        ;;
    "restart hab-sup") "$0" stop hab-sup && "$0" start hab-sup ;;
    *)
        echo "systemctl $*: not here" >&2
        exit 1
        ;;
esac
"#;

const UNINSTALL: &str = r#"#!/bin/bash
read -r -n 1 -p "Remove Builder's services and keep its data? [y|n] " answer
[ "$answer" = y ] || exit 1
echo
systemctl stop hab-sup
find /hab/sup/default/specs -name 'builder-*' -delete
rm -r /hab/pkgs/habitat
"#;

const INSTALL: &str = r#"#!/bin/bash
set -e
[ ! -f bldr.env ] || . ./bldr.env
mkdir -p /hab/pkgs
cp -a DEPOT/newest/habitat /hab/pkgs/
echo "${HAB_BLDR_PEER_ARG:-}" > /etc/hab-sup.peers
systemctl start hab-sup
sleep 2

settings() {
    mkdir -p "/hab/user/$1/config"
    cat > "/hab/user/$1/config/user.toml"
}
load() { hab svc load "habitat/$1" --channel on-prem-stable --force "${@:2}"; }
settings_of_api() {
    settings builder-api <<END
[s3]
backend = "minio"
key_id = "depot"
secret_key = "password"
endpoint = "${MINIO_ENDPOINT:-http://localhost:9000}"
bucket_name = "habitat-builder-artifact-store.local"

[datastore]
user = "hab"
password = ""
connection_timeout_sec = 5
host = "${POSTGRES_HOST:-localhost}"
port = 5432
ssl_mode = "prefer"
END
}
frontend() {
    load builder-memcached
    load builder-api --bind memcached:builder-memcached.default
}
give_key() {
    mkdir -p /hab/cache/keys
    first=$(find /hab/cache/keys -name 'bldr-*.pub' | head -n 1)
    if [ -n "$first" ]; then
        name=$(basename "$first" .pub)
        echo "Re-using existing builder key: $name"
    else
        name=$(hab user key generate bldr | grep -o 'bldr-[0-9]*' | head -n 1)
        echo "Generated new builder key: $name"
    fi
    hab file upload builder-api.default "$(date +%s)" "/hab/cache/keys/$name.pub"
    hab file upload builder-api.default "$(date +%s)" "/hab/cache/keys/$name.box.key"
}

if [ "$1" = --install-frontend ]; then
    settings_of_api
    frontend
    for _ in 1 2 3 4 5; do
        ls /hab/svc/builder-api/files/*.pub > /dev/null 2>&1 && exit 0
        echo "waiting for builder key..."
        sleep 5
    done
    give_key
    exit 0
fi
settings builder-datastore <<'END'
max_locks_per_transaction = 128
END
load builder-datastore
until (exec 3<> /dev/tcp/127.0.0.1/5432) 2> /dev/null; do sleep 0.5; done
printf '[datastore]\npassword = "%s"\n' "$(cat /hab/svc/builder-datastore/config/pwfile)" > password.toml
hab config apply builder-api.default "$(date +%s)" password.toml
settings builder-minio <<'END'
key_id = "depot"
secret_key = "password"
bucket_name = "habitat-builder-artifact-store.local"
END
settings_of_api
load builder-minio
frontend
sleep 2
give_key
"#;

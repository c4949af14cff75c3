//! A machine of its own inside this one: its own network, processes, users and files. It begins as a
//! copy of this machine, and nothing that is written there is seen here.
//!
//! It needs root. The machines of one test are in one network, `10.77.N.0/24`, in which this machine has
//! the address 254.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::{bound, run_dir, server_dir, tree};
use super::{Output, Result, Running};

/// How long a command may take. A first copy on a busy machine takes minutes.
const LIMIT: Duration = Duration::from_secs(600);

/// A network for machines. It vanishes with them.
pub struct Network {
    number: u8,
    bridge: String,
}

impl Network {
    /// Makes a network that no other test uses.
    pub fn new() -> Result<Network> {
        let mut last = String::new();
        for number in 1..250 {
            let bridge = format!("wspare{number}");
            match ip(&["link", "add", &bridge, "type", "bridge"]) {
                Ok(()) => {
                    let network = Network { number, bridge };
                    let address = format!("{}/24", network.address(254));
                    ip(&["addr", "add", &address, "dev", &network.bridge])?;
                    ip(&["link", "set", &network.bridge, "up"])?;
                    return Ok(network);
                }
                Err(error) if error.to_string().contains("File exists") => {}
                Err(error) => last = error.to_string(),
            }
        }
        Err(format!("no network for the machines could be made: {last}").into())
    }

    fn address(&self, host: u8) -> String {
        format!("10.77.{}.{host}", self.number)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", &self.bridge]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(arguments).output()?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!(
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&done.stderr).trim()
        )
        .into()),
    }
}

pub struct Machine {
    pub name: String,
    pub address: String,
    /// Both end it when they are dropped.
    _dir: tempfile::TempDir,
    _init: Running,
    /// The first process in it, as this machine counts.
    pid: u32,
}

impl Machine {
    /// Starts a machine. `others`: names and numbers of all machines of the network, for its
    /// `/etc/hosts`.
    pub async fn start(
        network: &Network,
        name: &str,
        number: u8,
        others: &[(&str, u8)],
    ) -> Result<Machine> {
        let dir = server_dir("machine-")?;
        let address = network.address(number);
        let hosts: String = others
            .iter()
            .map(|(name, number)| format!("{} {name}\n", network.address(*number)))
            .collect();
        fs::write(
            dir.path().join("hosts"),
            format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n{hosts}"),
        )?;
        let script = dir.path().join("init");
        fs::write(&script, INIT)?;
        let mut command = bound("unshare");
        command
            .args(["--mount", "--net", "--uts", "--pid", "--ipc", "--fork"])
            .args(["--kill-child=KILL", "bash"])
            .arg(&script)
            .arg(dir.path())
            .arg(name);
        let mut init = Running::start(command)?;
        init.wait_for_line(|line| line == "mounted", Duration::from_secs(30))
            .await?;
        // `setpriv` becomes `unshare`, whose only child is the first process of the machine.
        let family = tree(init.pid());
        let pid = *family.get(1).ok_or("the machine has no first process")?;
        let machine = Machine {
            name: name.to_string(),
            address,
            _dir: dir,
            _init: init,
            pid,
        };
        machine.connect(network, number)?;
        fs::write(run_dir().join("pids").join(pid.to_string()), "")?;
        Ok(machine)
    }

    /// Lays a line from the machine to the network.
    fn connect(&self, network: &Network, number: u8) -> Result<()> {
        let (here, there) = (
            format!("ws{}h{number}", network.number),
            format!("ws{}t{number}", network.number),
        );
        // One may be left over from a run that was killed.
        let _ = ip(&["link", "delete", &here]);
        let pid = self.pid.to_string();
        ip(&["link", "add", &here, "type", "veth", "peer", "name", &there])?;
        ip(&["link", "set", &here, "master", &network.bridge, "up"])?;
        ip(&["link", "set", &there, "netns", &pid])?;
        let address = &self.address;
        let line = format!(
            "ip link set {there} name eth0 && ip addr add {address}/24 dev eth0 && ip link set eth0 up && ip link set lo up"
        );
        let done = self.inside("root", &line).output()?;
        match done.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&done.stderr).into_owned().into()),
        }
    }

    /// Returns a path of the machine, as this machine sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc")
            .join(self.pid.to_string())
            .join("root")
            .join(path.trim_start_matches('/'))
    }

    fn inside(&self, user: &str, script: &str) -> Command {
        let mut command = bound("nsenter");
        command
            .args(["--target", &self.pid.to_string()])
            .args(["--mount", "--net", "--uts", "--pid", "--ipc", "--root"]);
        if user != "root" {
            command.args([
                "setpriv",
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
            ]);
        }
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .args(["bash", "-c", &format!("cd /root\n{script}")]);
        command
    }

    /// Starts a command there, as that user.
    pub fn spawn(&self, user: &str, script: &str) -> Result<Running> {
        Running::start(self.inside(user, script))
    }

    /// Runs a command there to its end, as that user. Both of its streams are its output, in their order.
    pub async fn run(&self, user: &str, script: &str) -> Result<Output> {
        let both = format!("exec 2>&1\n{script}");
        self.spawn(user, &both)?.wait(LIMIT).await
    }

    /// Runs a command that must succeed.
    pub async fn must(&self, script: &str) -> Result<String> {
        let output = self.run("root", script).await?;
        match output.code {
            Some(0) => Ok(output.stdout),
            _ => Err(format!("on {}: {script}\n{output}", self.name).into()),
        }
    }

    /// Kills every process on it at once, as a power cut does. Its files stay.
    pub async fn cut_power(&self) -> Result<()> {
        self.run("root", "kill -KILL -1").await.map(drop)
    }
}

/// The first process of a machine. Its files are in memory, above those of this machine.
const INIT: &str = r#"
set -e
dir=$1 name=$2
mount --make-rprivate /
mkdir -p "$dir/files"
mount -t tmpfs -o mode=0755 tmpfs "$dir/files"
mkdir "$dir"/files/{upper,work,root}
root=$dir/files/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/files/upper,workdir=$dir/files/work" "$root"
cp "$dir/hosts" "$root/etc/hosts"
echo "$name" > "$root/etc/hostname"
hostname "$name"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mkdir -p "$root/root" "$root/hab"
cd "$root"
echo mounted >&2
# The first process must take leave of every dead one: a server believes that a dead process which is still listed
# has its data directory.
exec chroot . bash -c 'while :; do sleep 3600 & wait "$!"; done'
"#;

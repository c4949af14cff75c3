//! Ports for servers that are stopped and started again on them.
//!
//! They are below the range that the kernel gives to connections; otherwise a connection could take
//! the port of a server that was killed and will start again. Each process has a block for itself,
//! and gives each port once before any twice.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::sync::{Mutex, OnceLock};

const FIRST: u16 = 10_240;
const BLOCK: u16 = 1000;
const BLOCKS: u16 = 22;

struct Ports {
    /// The holder of the lock on this file has the block.
    _lock: File,
    first: u16,
    given: u16,
}

impl Ports {
    fn claim() -> io::Result<Self> {
        let me = rustix::process::getuid().as_raw();
        for number in 0..BLOCKS {
            let name = format!("warm-spare-ports-{me}-{number}");
            let lock = File::create(std::env::temp_dir().join(name))?;
            if lock.try_lock().is_ok() {
                return Ok(Self {
                    _lock: lock,
                    first: FIRST + number * BLOCK,
                    given: 0,
                });
            }
        }
        Err(io::Error::other("other tests have all the ports"))
    }

    fn next(&mut self) -> io::Result<u16> {
        for _ in 0..BLOCK {
            let port = self.first + self.given;
            self.given = (self.given + 1) % BLOCK;
            // Another program on this machine may use it.
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return Ok(port);
            }
        }
        Err(io::Error::other("no port is free"))
    }
}

/// Returns a port on which nobody listens.
pub fn free_port() -> io::Result<u16> {
    static PORTS: OnceLock<Mutex<Ports>> = OnceLock::new();
    let ports = match PORTS.get() {
        Some(ports) => ports,
        None => {
            let claimed = Mutex::new(Ports::claim()?);
            PORTS.get_or_init(|| claimed)
        }
    };
    ports.lock().expect("nobody panics with it").next()
}

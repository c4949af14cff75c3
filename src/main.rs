use clap::Parser;
use std::process::ExitCode;
use warm_spare::command::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The proxies of the Supervisor must not carry S3 traffic, and the S3 library reads these
    // variables.
    // SAFETY: no other thread runs yet.
    for name in [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ] {
        unsafe { std::env::remove_var(name) };
    }
    leave_no_core();
    // Dependencies may compile in two TLS providers; without a choice, the first use would panic.
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("error: cannot install the TLS provider ring: another one is installed already");
        return ExitCode::from(3);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::from(3);
        }
    };
    let code = runtime.block_on(run(arguments));
    // A look-up of a host name may hang for long in a thread that cannot be stopped.
    runtime.shutdown_background();
    warm_spare::cluster::last_words();
    code
}

/// Forbids core files. The memory holds passwords, and every service of Builder runs as the same
/// user and could read such a file.
fn leave_no_core() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        eprintln!(
            "warning: cannot forbid core files: {error}; after a crash a core file may hold passwords"
        );
    }
}

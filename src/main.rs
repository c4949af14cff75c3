use clap::Parser;
use std::process::ExitCode;
use warm_spare::command::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Proxies set for the Supervisor must not carry S3 traffic, and the S3 library would take them from here.
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
    // Two TLS providers may be compiled in through dependencies; without a choice, the first use would panic.
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("error: a TLS provider was installed before ours");
        return ExitCode::from(3);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::from(3);
        }
    };
    let code = runtime.block_on(run(arguments));
    // A look-up of a host's name may hang for long in a thread that nobody can end.
    runtime.shutdown_background();
    warm_spare::cluster::last_words();
    code
}

/// Passwords lie in memory, and every service of Builder's runs as our user: no core file, which all of them could read.
fn leave_no_core() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        eprintln!("warning: a crash may leave a core file with passwords in it: {error}");
    }
}

//! The process: read the configuration, start logging, serve, drain, say how it went.

use std::{env, fmt::Display, io::Write, num::NonZero, process::ExitCode, thread};

use seatlock::{
    app::{self, End, StartError},
    config::{self, Config, Invocation, LogFormat, Traces},
    http::probe,
    shutdown::{Shutdown, Signals},
    telemetry::{self, Export},
};
use tokio::runtime::{Builder, Runtime};

/// It costs a request a tenth less than the system's own, and a connection less than a KiB more.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What container engines take for unhealthy; they reserve the other codes.
const UNHEALTHY: u8 = 1;
/// The exit codes of `sysexits.h`; `--help` explains them.
const USAGE: u8 = 64;
const UNAVAILABLE: u8 = 69;
const SOFTWARE: u8 = 70;

fn main() -> ExitCode {
    match config::parse(env::args_os(), env::vars_os()) {
        Ok(Invocation::Run(config)) => serve(*config),
        Ok(Invocation::Print(text)) => {
            // Whoever closed the pipe does not want the rest.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Invocation::Health(address)) => match probe::ready(address) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(UNHEALTHY, error),
        },
        Err(mistakes) => fail(USAGE, mistakes),
    }
}

fn serve(config: Config) -> ExitCode {
    let runtime = match runtime(config.threads) {
        Ok(runtime) => runtime,
        Err(error) => return fail(SOFTWARE, error),
    };
    let ended = runtime.block_on(async {
        let export = config.traces.as_ref().map(export);
        if let Err(error) = telemetry::install(&config.log, config.log_format == LogFormat::Json, export.as_ref()) {
            return fail(SOFTWARE, error);
        }
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let shutdown = Shutdown::new();
        match Signals::take() {
            Ok(signals) => tokio::spawn(signals.drive(shutdown.clone())),
            Err(error) => return fail(SOFTWARE, error),
        };
        match app::run(config, shutdown).await {
            Ok(End::Clean) => ExitCode::SUCCESS,
            Ok(End::Cut) => ExitCode::from(SOFTWARE),
            Err(error @ (StartError::Setting { .. } | StartError::Catalogue(_))) => fail(USAGE, error),
            Err(error @ StartError::Listen { .. }) => fail(UNAVAILABLE, error),
            Err(error @ StartError::Metrics(_)) => fail(SOFTWARE, error),
        }
    });
    // What is still running was given up by the drain; nothing waits for it.
    runtime.shutdown_background();
    ended
}

fn runtime(threads: Option<u32>) -> std::io::Result<Runtime> {
    let given = threads.and_then(|threads| usize::try_from(threads).ok());
    // The system has its own share of every message; and what threads say to each other, requests wait for.
    let fitting = || thread::available_parallelism().map_or(1, NonZero::get).saturating_sub(1).max(1);
    Builder::new_multi_thread().worker_threads(given.unwrap_or_else(fitting)).enable_all().build()
}

fn export(traces: &Traces) -> Export {
    Export {
        endpoint: traces.endpoint.reveal().to_owned(),
        shown: traces.endpoint.to_string(),
        share: traces.share,
        heeds_parent: traces.heeds_parent,
        timeout: traces.timeout,
    }
}

/// Says why on standard error, in words for people whatever the log's format is.
fn fail(code: u8, why: impl Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "seatlock: {why}");
    ExitCode::from(code)
}

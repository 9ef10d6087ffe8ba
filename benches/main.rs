//! The benches: what it costs to tell a room ([`fanout`]) and what a lock costs ([`locks`]), each beside a peer measured in
//! the same run. `benches/run` builds and runs them; `benches/README.md` has results.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers of a report: far below 2^52"
)]

mod fanout;
mod locks;
mod support;

use support::Wanted;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let (wanted, folder) = (Wanted::read()?, tempfile::tempdir()?);
    if wanted.wants("locks") {
        locks::run(&wanted, folder.path()).await?;
    }
    if wanted.wants("fanout") {
        fanout::run(&wanted, folder.path()).await?;
    }
    Ok(())
}

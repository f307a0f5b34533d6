//! x
pub mod ring;
use crate::Outcome;
#[derive(clap::Args)]
pub struct BenchArgs {}
pub fn run(_args: BenchArgs) -> Outcome {
    Ok(())
}

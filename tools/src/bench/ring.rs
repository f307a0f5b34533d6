//! x
use crate::Outcome;
#[derive(clap::Args)]
pub struct PeerArgs {}
pub fn peer(_args: &PeerArgs) -> Outcome {
    Ok(())
}

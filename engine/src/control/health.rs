//! What drives say of their own health, asked once a minute by a thread that may wait for it, and shown beside what the
//! shard counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvring_ipc::stats::{DEVICE_ROWS, Stats};

use crate::device::medium::Medium;
use crate::device::nvme::{self, Health};
use crate::device::spdk;
use crate::metrics::DeviceColumn;

const PAUSE: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(100);

/// What a drive says, if it is one that says anything.
pub fn of(medium: &Medium) -> Option<Health> {
    match medium {
        Medium::Directory(_) => None,
        Medium::BlockDevice(_) => Health::of(&nvme::open(medium).ok()?).ok(),
        Medium::Spdk(_) => spdk::health(medium.address()?).ok(),
    }
}

/// Shows the health of these media from now on, until `stop`.
pub fn watch(stats: Stats, media: Vec<Medium>, stop: Arc<AtomicBool>) {
    if media.iter().all(|medium| matches!(medium, Medium::Directory(_))) {
        return;
    }
    let watch = move || {
        while !stop.load(Ordering::Relaxed) {
            for (at, medium) in media.iter().enumerate().take(DEVICE_ROWS) {
                match of(medium) {
                    Some(health) => show(&stats, at, &health),
                    None => stats.device(at)[DeviceColumn::HealthKnown as usize].store(0, Ordering::Relaxed),
                }
            }
            let mut left = PAUSE;
            while !left.is_zero() && !stop.load(Ordering::Relaxed) {
                #[expect(clippy::disallowed_methods, reason = "a thread of the control plane")]
                std::thread::sleep(NAP);
                left = left.saturating_sub(NAP);
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("kvring-health".into()).spawn(watch) {
        tracing::warn!("no thread for the devices' health: {error}: it is not shown");
    }
}

fn show(stats: &Stats, at: usize, health: &Health) {
    let row = stats.device(at);
    let set = |column: DeviceColumn, value: u64| row[column as usize].store(value, Ordering::Relaxed);
    set(DeviceColumn::CriticalWarning, u64::from(health.critical_warning));
    set(DeviceColumn::Temperature, u64::try_from(health.temperature_celsius).unwrap_or(0));
    set(DeviceColumn::SparePercent, u64::from(health.available_spare_percent));
    set(DeviceColumn::UsedPercent, u64::from(health.percentage_used));
    set(DeviceColumn::MediaErrors, health.media_errors_count);
    set(DeviceColumn::DriveWritten, health.written_bytes);
    set(DeviceColumn::HealthKnown, 1);
}

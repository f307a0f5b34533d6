//! What a replay has shown: a table, and the same as JSON. The JSON is an interface.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::worker::{Counts, Said, Window, Windows, from_hex, new_histogram};

/// Counts over all instances, and what the server says.
pub struct Report {
    /// Sums.
    pub counts: Counts,
    match_ns: Histogram<u64>,
    load_ns: Histogram<u64>,
    request_ns: Histogram<u64>,
    /// Hit ratios that no cache beats: without end, and of this capacity; and that in blocks.
    bounds: Option<(f64, f64, u64)>,
    /// Requests a second that were due, in an open loop.
    offered: Option<f64>,
    /// Seconds, and blocks loaded and stored until then.
    pub series: Vec<[f64; 3]>,
    windows: Option<Windows>,
    elapsed: Duration,
    server_cpu_s: f64,
    block_bytes: u64,
    /// Growth of the server's counters; `None` if it was gone at the end.
    server: Option<Value>,
    page_bytes: u64,
    /// Blocks that were there before.
    blocks_before: u64,
    instances: usize,
    devices: Vec<String>,
}

impl Report {
    /// From the instances' results and the server's counters before and after.
    pub fn new(
        results: &[Said],
        elapsed: Duration,
        server_cpu_s: f64,
        block_bytes: u64,
        before: &Value,
        after: Option<&Value>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let (mut total, mut windows) = (Counts::default(), None);
        let (mut match_all, mut load_all, mut request_all) = (new_histogram(), new_histogram(), new_histogram());
        for said in results {
            let Said::Result { counts, match_ns, load_ns, request_ns, windows: told } = said else { continue };
            let told = Windows::from_told(told)?;
            match &mut windows {
                None => windows = Some(told),
                Some(windows) => windows.add(told),
            }
            total.requests += counts.requests;
            total.blocks_requested += counts.blocks_requested;
            total.blocks_hit_dram += counts.blocks_hit_dram;
            total.blocks_hit_ssd += counts.blocks_hit_ssd;
            total.blocks_missed += counts.blocks_missed;
            total.blocks_stored += counts.blocks_stored;
            total.blocks_present += counts.blocks_present;
            total.blocks_dropped += counts.blocks_dropped;
            total.blocks_unloaded += counts.blocks_unloaded;
            total.wrong_blocks += counts.wrong_blocks;
            total.sessions += counts.sessions;
            total.requests_without_server += counts.requests_without_server;
            total.beside_us += counts.beside_us;
            match_all.add(from_hex(match_ns)?)?;
            load_all.add(from_hex(load_ns)?)?;
            request_all.add(from_hex(request_ns)?)?;
        }
        let server = after.map(|after| {
            let grown = after["metrics"].as_object().into_iter().flatten().map(|(name, value)| {
                let level = kvring_engine::metrics::GAUGES.contains(&name.as_str());
                let before = if level { 0 } else { before["metrics"][name].as_u64().unwrap_or(0) };
                (name.clone(), Value::from(value.as_u64().unwrap_or(0).saturating_sub(before)))
            });
            Value::Object(grown.collect())
        });
        let devices =
            before["devices"].as_array().into_iter().flatten().filter_map(|d| d.as_str().map(str::to_owned)).collect();
        Ok(Self {
            counts: total,
            match_ns: match_all,
            load_ns: load_all,
            request_ns: request_all,
            bounds: None,
            offered: None,
            series: Vec::new(),
            windows,
            elapsed,
            server_cpu_s,
            block_bytes,
            server,
            page_bytes: before["page_bytes"].as_u64().unwrap_or(0),
            blocks_before: before["metrics"]["blocks_count"].as_u64().unwrap_or(0),
            instances: results.len(),
            devices,
        })
    }

    /// What no cache beats.
    pub fn bound_by(&mut self, infinite: f64, belady: f64, capacity: u64) {
        // A server that is gone says no capacity.
        self.bounds = (capacity > 0).then_some((infinite, belady, capacity));
    }

    /// Requests came at this rate, whatever became of those before.
    pub fn offered(&mut self, per_s: f64) {
        self.offered = Some(per_s);
    }

    fn per_s(&self) -> f64 {
        self.counts.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// GB a second loaded from each tier, and stored.
    fn gb_s(&self) -> [f64; 3] {
        let gb_s = |blocks: u64| (blocks * self.block_bytes) as f64 / 1e9 / self.elapsed.as_secs_f64().max(1e-9);
        [self.counts.blocks_hit_dram, self.counts.blocks_hit_ssd, self.counts.blocks_stored].map(gb_s)
    }

    fn hit_ratio(&self) -> f64 {
        let hit = self.counts.blocks_requested - self.counts.blocks_missed;
        hit as f64 / self.counts.blocks_requested.max(1) as f64
    }

    fn bytes_loaded(&self) -> u64 {
        (self.counts.blocks_hit_dram + self.counts.blocks_hit_ssd) * self.block_bytes
    }

    fn bytes_stored(&self) -> u64 {
        self.counts.blocks_stored * self.block_bytes
    }

    /// What may be wrong with the numbers.
    fn doubts(&self) -> Vec<String> {
        let seconds = self.elapsed.as_secs_f64();
        let unserved = self.counts.requests_without_server;
        let all = [
            (self.page_bytes == 4096, "the pool is on 4 KiB pages; hugepages would cost fewer TLB misses".to_owned()),
            (unserved > 0, format!("{unserved} requests found no server")),
            (self.server.is_none(), "the server was gone at the end, so its counters are missing".to_owned()),
            (seconds < 1.0, format!("{seconds:.2} s is short; give more --requests")),
            (
                self.offered.is_some_and(|offered| self.per_s() < 0.97 * offered),
                format!(
                    "{:.0} requests a second were due and {:.0} were answered: times are those of a queue that grows",
                    self.offered.unwrap_or(0.0),
                    self.per_s()
                ),
            ),
            (
                self.blocks_before > 0,
                format!(
                    "{} blocks were there before: what hit them is no merit, and the optimum does not know them",
                    self.blocks_before
                ),
            ),
            (
                self.counts.beside_us as f64 / 1e6 > 0.2 * seconds * self.instances.max(1) as f64,
                format!(
                    "instances spent {:.1} s on making and comparing bytes: left out of the times, and not out of what they could ask",
                    self.counts.beside_us as f64 / 1e6
                ),
            ),
            (
                self.offered.is_none(),
                "closed loop: each request waits for the one before it, so times say little about a busy system"
                    .to_owned(),
            ),
        ];
        all.into_iter().filter(|(is, _)| *is).map(|(_, doubt)| doubt).collect()
    }

    /// Span by span, the last of which may be a short one and is left out: what a comparison takes for rounds.
    fn windows(&self) -> Value {
        let Some(Windows { each_ms, all }) = &self.windows else { return Value::Null };
        let whole = &all[..all.len().saturating_sub(1)];
        let seconds = *each_ms as f64 / 1000.0;
        let of = |value: &dyn Fn(&Window) -> Option<f64>| whole.iter().filter_map(value).collect::<Vec<_>>();
        let asked = |window: &Window| (window.blocks_requested > 0).then_some(window.blocks_requested as f64);
        let hit = |window: &Window| Some(1.0 - window.blocks_missed as f64 / asked(window)?);
        let us = |histogram: fn(&Window) -> &Histogram<u64>| {
            let at = |q: f64| {
                of(&|window| {
                    let histogram = histogram(window);
                    (!histogram.is_empty()).then(|| histogram.value_at_quantile(q) as f64 / 1000.0)
                })
            };
            json!({"p50": at(0.5), "p99": at(0.99)})
        };
        json!({
            "seconds": seconds,
            "requests_per_s": of(&|window| Some(window.requests as f64 / seconds)),
            "hit_ratio": of(&hit),
            "request_us": us(|window| &window.request_ns),
            "load_us": us(|window| &window.load_ns),
            "match_us": us(|window| &window.match_ns),
        })
    }

    /// The interface.
    pub fn json(&self) -> Value {
        let percentiles = |histogram: &Histogram<u64>| {
            let at = |q: f64| histogram.value_at_quantile(q) as f64 / 1000.0;
            json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999), "max": histogram.max() as f64 / 1000.0})
        };
        let cdf = |histogram: &Histogram<u64>| -> Vec<[f64; 2]> {
            let steps = histogram.iter_quantiles(4).filter(|step| step.count_since_last_iteration() > 0);
            steps.map(|step| [step.value_iterated_to() as f64 / 1000.0, step.quantile()]).collect()
        };
        let [dram, ssd, stored] = self.gb_s();
        let (infinite, belady, capacity) = self.bounds.unwrap_or_default();
        json!({
            "request_us": percentiles(&self.request_ns),
            "requests_per_s": self.per_s(),
            "offered_per_s": self.offered,
            "dram_gb_s": dram,
            "ssd_gb_s": ssd,
            "stored_gb_s": stored,
            "hit_ratio_infinite": infinite,
            "hit_ratio_belady": belady,
            "capacity_blocks": capacity,
            "block_bytes": self.block_bytes,
            "cdf_us": {"match": cdf(&self.match_ns), "load": cdf(&self.load_ns), "request": cdf(&self.request_ns)},
            "series": self.series,
            "windows": self.windows(),
            "requests": self.counts.requests,
            "blocks_requested": self.counts.blocks_requested,
            "blocks_hit_dram": self.counts.blocks_hit_dram,
            "blocks_hit_ssd": self.counts.blocks_hit_ssd,
            "blocks_missed": self.counts.blocks_missed,
            "blocks_stored": self.counts.blocks_stored,
            "blocks_present": self.counts.blocks_present,
            "blocks_dropped": self.counts.blocks_dropped,
            "blocks_unloaded": self.counts.blocks_unloaded,
            "wrong_blocks": self.counts.wrong_blocks,
            "hit_ratio": self.hit_ratio(),
            "bytes_loaded": self.bytes_loaded(),
            "bytes_stored": self.bytes_stored(),
            "elapsed_s": self.elapsed.as_secs_f64(),
            "server_cpu_s": self.server_cpu_s,
            "match_us": percentiles(&self.match_ns),
            "load_us": percentiles(&self.load_ns),
            "sessions": self.counts.sessions,
            "requests_without_server": self.counts.requests_without_server,
            "server": self.server,
            "devices": self.devices,
            "doubts": self.doubts(),
        })
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let c = &self.counts;
        let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let share = |blocks: u64| 100.0 * blocks as f64 / c.blocks_requested.max(1) as f64;
        let seconds = self.elapsed.as_secs_f64();
        let of_server = |name: &str| self.server.as_ref().and_then(|server| server[name].as_u64()).unwrap_or(0);
        writeln!(
            f,
            "requests            {:>12}   {:.0}/s over {seconds:.2} s",
            c.requests,
            c.requests as f64 / seconds
        )?;
        writeln!(f, "blocks requested    {:>12}   of {} KiB", c.blocks_requested, self.block_bytes >> 10)?;
        writeln!(f, "  hit in DRAM       {:>12}   {:.1} %", c.blocks_hit_dram, share(c.blocks_hit_dram))?;
        writeln!(f, "  hit on SSD        {:>12}   {:.1} %", c.blocks_hit_ssd, share(c.blocks_hit_ssd))?;
        writeln!(
            f,
            "  missed            {:>12}   {:.1} %, of which {} were resident and not loaded",
            c.blocks_missed,
            share(c.blocks_missed),
            c.blocks_unloaded
        )?;
        writeln!(
            f,
            "  stored            {:>12}   {} present already, {} dropped",
            c.blocks_stored, c.blocks_present, c.blocks_dropped
        )?;
        writeln!(f, "wrong blocks        {:>12}   every loaded byte was compared", c.wrong_blocks)?;
        writeln!(f, "hit ratio           {:>12.4}", self.hit_ratio())?;
        if let Some((infinite, belady, capacity)) = self.bounds {
            let of = 100.0 * self.hit_ratio() / belady.max(1e-9);
            writeln!(
                f,
                "  Belady's optimum  {belady:>12.4}   for {capacity} blocks, knowing what comes: {of:.1} % of it"
            )?;
            writeln!(f, "  infinite cache    {infinite:>12.4}")?;
        }
        let [dram, ssd, stored] = self.gb_s();
        writeln!(f, "throughput          {dram:>7.2} GB/s   from DRAM, {ssd:.2} from SSD, {stored:.2} stored")?;
        if let Some(offered) = self.offered {
            writeln!(f, "requests            {:>9.0} /s   of {offered:.0} /s that were due", self.per_s())?;
        }
        writeln!(
            f,
            "moved               {:>9.2} GB   loaded ({:.2} GB/s), {:.2} GB stored",
            gb(self.bytes_loaded()),
            gb(self.bytes_loaded()) / seconds,
            gb(self.bytes_stored())
        )?;
        writeln!(
            f,
            "SSD                 {:>9.2} GB   read, {:.2} GB written",
            gb(of_server("ssd_read_bytes")),
            gb(of_server("ssd_write_bytes"))
        )?;
        for (name, histogram) in [("match", &self.match_ns), ("load", &self.load_ns), ("whole", &self.request_ns)] {
            let us = |q: f64| histogram.value_at_quantile(q) as f64 / 1000.0;
            writeln!(
                f,
                "{name:<5} latency       {:>9.1} us   p50; p90 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
                us(0.5),
                us(0.9),
                us(0.99),
                us(0.999),
                histogram.max() as f64 / 1000.0
            )?;
        }
        writeln!(
            f,
            "server CPU          {:>10.2} s   {:.2} s a GB loaded or stored",
            self.server_cpu_s,
            self.server_cpu_s / gb(self.bytes_loaded() + self.bytes_stored()).max(1e-9)
        )?;
        for device in &self.devices {
            writeln!(f, "device              {device}")?;
        }
        for doubt in self.doubts() {
            writeln!(f, "doubt: {doubt}")?;
        }
        Ok(())
    }
}

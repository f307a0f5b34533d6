//! `kvring top`: a server while it works. Reads its stats segment twice a second, so it shows one that hangs too.

use std::time::Duration;

use clap::Args;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use kvring_ipc::client::monotonic_ns;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, Paragraph, Row as TableRow, Sparkline, Table};

use super::{Health, Sample, Server, Which, short_ns};
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring top`.
#[derive(Args)]
#[command(after_help = "Keys: q ends it, p pauses, s sorts sessions by the next column.")]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0 / Beside::LOOKS_PER_S)]
    interval: f64,
    #[command(flatten)]
    settings: Settings,
}

/// How much of the past the rates' lines show.
const HISTORY: usize = 240;
/// What sessions can be sorted by.
const SORTS: [(&str, &[&str]); 4] = [
    ("session", &[]),
    ("loads", &["load_blocks_dram_count", "load_blocks_ssd_count"]),
    ("stores", &["commit_blocks_count"]),
    ("matches", &["matches_count"]),
];

/// Shows it until it is told to end.
pub fn top(args: &TopArgs) -> Outcome {
    if !(0.05..=60.0).contains(&args.interval) {
        return Err(format!("--interval {}: expected 0.05 to 60 seconds", args.interval).into());
    }
    let socket = args.settings.load()?.config.socket;
    let mut server = Server::find(&socket, Which::Current)?;
    let mut screen = Screen::new(server.sample());
    let mut terminal =
        ratatui::try_init().map_err(|error| format!("no terminal to draw on ({error}): use kvring stat"))?;
    let shown = loop {
        let health = server.health();
        if let Err(error) = terminal.draw(|frame| screen.draw(frame, &server, health)) {
            break Err(error.into());
        }
        match event::poll(Duration::from_secs_f64(args.interval)) {
            Ok(true) => match event::read() {
                Ok(Event::Key(key)) => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => break Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => break Ok(()),
                    KeyCode::Char('p') => screen.paused = !screen.paused,
                    KeyCode::Char('s') => screen.sort = (screen.sort + 1) % SORTS.len(),
                    _ => {}
                },
                Ok(_) => {}
                Err(error) => break Err(error.into()),
            },
            Ok(false) => {}
            Err(error) => break Err(error.into()),
        }
        if !matches!(health, Health::Serving | Health::Hung { .. } | Health::Halted)
            && let Ok(next) = Server::find(&socket, Which::Current)
            && next.stats.owner() != server.stats.owner()
        {
            // Another engine process has taken over: its counters begin anew.
            server = next;
            screen = Screen { sort: screen.sort, ..Screen::new(server.sample()) };
        }
        if !screen.paused {
            screen.look(server.sample());
        }
    };
    ratatui::restore();
    shown
}

/// `top` beside a server, on a terminal that swallows what is drawn: for measuring what that costs.
pub struct Beside {
    server: Server,
    screen: Screen,
    terminal: ratatui::Terminal<ratatui::backend::CrosstermBackend<std::io::Sink>>,
}

impl Beside {
    /// How often it looks a second, if nobody says otherwise.
    pub const LOOKS_PER_S: f64 = 2.0;

    pub fn new(server: Server) -> std::io::Result<Self> {
        let backend = ratatui::backend::CrosstermBackend::new(std::io::sink());
        let viewport = ratatui::Viewport::Fixed(Rect::new(0, 0, 130, 40));
        let terminal = ratatui::Terminal::with_options(backend, ratatui::TerminalOptions { viewport })?;
        Ok(Self { screen: Screen::new(server.sample()), server, terminal })
    }

    /// One look: reads all that the server shows, and draws it.
    pub fn look(&mut self) -> std::io::Result<()> {
        self.screen.look(self.server.sample());
        let health = self.server.health();
        self.terminal.draw(|frame| self.screen.draw(frame, &self.server, health)).map(drop)
    }
}

/// What is on the screen.
struct Screen {
    last: Sample,
    before: Sample,
    loads: Vec<u64>,
    stores: Vec<u64>,
    paused: bool,
    sort: usize,
}

impl Screen {
    fn new(sample: Sample) -> Self {
        Self { before: sample.clone(), last: sample, loads: Vec::new(), stores: Vec::new(), paused: false, sort: 0 }
    }

    fn look(&mut self, sample: Sample) {
        // Keys come in between: a rate of a moment would be noise.
        if sample.at.duration_since(self.last.at) < Duration::from_millis(40) {
            return;
        }
        self.before = std::mem::replace(&mut self.last, sample);
        let loaded = self.rate("load_blocks_dram_count") + self.rate("load_blocks_ssd_count");
        for (line, rate) in
            [(&mut self.loads, loaded), (&mut self.stores, rate(&self.last, &self.before, "commit_blocks_count"))]
        {
            line.push(rate as u64);
            line.drain(..line.len().saturating_sub(HISTORY));
        }
    }

    fn rate(&self, name: &str) -> f64 {
        rate(&self.last, &self.before, name)
    }

    fn draw(&self, frame: &mut Frame<'_>, server: &Server, health: Health) {
        let devices = self.last.devices.len() as u16;
        let latencies = self.latencies();
        let rows = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(if devices > 0 { 4 } else { 3 }),
            Constraint::Length(5),
            Constraint::Length(2 + latencies.len().max(1) as u16),
            Constraint::Length(if devices > 0 { 3 + devices } else { 0 }),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .split(frame.area());
        self.draw_head(frame, rows[0], server, health);
        self.draw_tiers(frame, rows[1], server);
        self.draw_rates(frame, rows[2], server);
        draw_table(
            frame,
            rows[3],
            " latency since the last look ",
            &["what", "count/s", "p50", "p99", "p99.9"],
            &[30, 12, 12, 12, 12],
            latencies,
        );
        if devices > 0 {
            let header = ["device", "reads w/f", "writes w/f", "read/s", "written/s", "errors", "what it is"];
            draw_table(frame, rows[4], " devices ", &header, &[6, 10, 10, 12, 12, 7, 40], self.devices(server));
        }
        let title = format!(" sessions: {} (sorted by {}) ", self.last.sessions.len(), SORTS[self.sort].0);
        let header = [
            "session",
            "inst",
            "process",
            "rank",
            "match/s",
            "hit %",
            "DRAM/s",
            "SSD/s",
            "store/s",
            "leases",
            "loans",
            "rings s/c",
            "load p50",
        ];
        let widths = [8, 5, 8, 4, 9, 6, 9, 9, 9, 6, 6, 10, 9];
        draw_table(frame, rows[5], &title, &header, &widths, self.sessions());
        let keys = if self.paused { " PAUSED   q end   p go on   s sort" } else { " q end   p pause   s sort" };
        frame.render_widget(Paragraph::new(keys).dim(), rows[6]);
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect, server: &Server, health: Health) {
        let (epoch, pid, _) = server.stats.owner();
        let style = if health == Health::Serving { Style::new().green() } else { Style::new().red().bold() };
        let up = Duration::from_nanos(monotonic_ns().saturating_sub(server.stats.started_ns()));
        let up = HumanDuration(up);
        let text = &server.text;
        let lines = vec![
            Line::from(vec![
                Span::from(format!("kvring {} ", text.version)).bold(),
                Span::from(format!("{} ", text.socket)),
                Span::styled(health.to_string(), style),
            ]),
            Line::from(format!(
                "engine {pid}, keeper {}, epoch {epoch}, for {up}; {} blocks, {} leases; the shard slept {:.0}/s",
                text.keeper_pid,
                HumanCount(self.last.counter("blocks_count")),
                HumanCount(self.last.counter("leases_count")),
                self.rate("sleeps_count"),
            )),
        ];
        frame.render_widget(Paragraph::new(lines), area);
    }

    fn draw_tiers(&self, frame: &mut Frame<'_>, area: Rect, server: &Server) {
        let v = |name: &str| self.last.counter(name);
        let rows = Layout::vertical([Constraint::Length(1); 4]).split(area);
        let gauge = |name: &str, slots: u64, free: u64, more: String| {
            let used = slots.saturating_sub(free);
            let ratio = if slots == 0 { 0.0 } else { used as f64 / slots as f64 };
            let bytes = HumanBytes(slots * server.text.slot_bytes);
            let label = format!("{name} {:.1} % of {} slots, {bytes}{more}", ratio * 100.0, HumanCount(slots));
            Gauge::default().ratio(ratio).label(label).gauge_style(Style::new().blue().on_black())
        };
        let quarantined = v("host_slots_quarantined_count");
        let more = if quarantined > 0 { format!(", {quarantined} in quarantine") } else { String::new() };
        frame.render_widget(gauge("DRAM", v("host_slots_count"), v("host_slots_free_count"), more), rows[0]);
        let mut at = 1;
        if !self.last.devices.is_empty() {
            frame.render_widget(gauge("SSD", v("ssd_slots_count"), v("ssd_slots_free_count"), String::new()), rows[at]);
            at += 1;
        }
        let (asked, hit) = (self.rate("match_blocks_requested_count"), self.rate("match_blocks_hit_count"));
        let share =
            |hit: f64, asked: f64| if asked > 0.0 { format!("{:.1} %", 100.0 * hit / asked) } else { "-".into() };
        let line = format!(
            "hit ratio {} now, {} since the start; evicted {:.0}/s DRAM, {:.0}/s SSD; missed {:.0}/s, dropped {:.0}/s, forgotten {:.0}/s",
            share(hit, asked),
            share(v("match_blocks_hit_count") as f64, v("match_blocks_requested_count") as f64),
            self.rate("evict_host_count"),
            self.rate("evict_ssd_count"),
            self.rate("load_blocks_miss_count"),
            self.rate("reserve_blocks_dropped_count"),
            self.rate("blocks_forgotten_count"),
        );
        frame.render_widget(Paragraph::new(line), rows[at]);
    }

    fn draw_rates(&self, frame: &mut Frame<'_>, area: Rect, server: &Server) {
        let halves = Layout::horizontal([Constraint::Percentage(50); 2]).split(area);
        let slot_bytes = server.text.slot_bytes as f64;
        for (area, name, line) in [(halves[0], "loads", &self.loads), (halves[1], "stores", &self.stores)] {
            let now = line.last().copied().unwrap_or(0);
            let bytes = HumanBytes((now as f64 * slot_bytes) as u64);
            let title = format!(" {name}: {} blocks/s, {bytes}/s ", HumanCount(now));
            // The line ends at the right edge.
            let shown = line.len().saturating_sub(usize::from(area.width.saturating_sub(2)));
            let spark = Sparkline::default().block(Block::bordered().title(title)).data(&line[shown..]).cyan();
            frame.render_widget(spark, area);
        }
    }

    fn latencies(&self) -> Vec<Vec<String>> {
        let seconds = self.last.at.duration_since(self.before.at).as_secs_f64().max(1e-3);
        let mut rows = Vec::new();
        for (name, now) in &self.last.histograms {
            let then = self.before.histograms.iter().find(|(other, _)| other == name);
            let since = then.map_or_else(|| now.clone(), |(_, then)| now.since(then));
            let count = since.count();
            if count == 0 {
                continue;
            }
            let labels: Vec<_> = name.labels.iter().map(|(_, value)| value.as_str()).collect();
            let at = |quantile| since.quantile_ns(quantile).map_or_else(String::new, short_ns);
            let per_s = format!("{:.1}", count as f64 / seconds);
            rows.push(vec![format!("{} {}", name.name, labels.join(" ")), per_s, at(0.5), at(0.99), at(0.999)]);
        }
        rows
    }

    fn devices(&self, server: &Server) -> Vec<Vec<String>> {
        let rows = self.last.devices.iter().zip(&self.before.devices).zip(&server.text.devices).enumerate();
        let seconds = self.last.at.duration_since(self.before.at).as_secs_f64().max(1e-3);
        let row = |(at, ((now, then), text)): (usize, ((&super::Row, &super::Row), &String))| {
            let v = |name: &str| now.get(name).copied().unwrap_or(0);
            let per_s = |name: &str| {
                let more = v(name).saturating_sub(then.get(name).copied().unwrap_or(0));
                HumanBytes((more as f64 / seconds) as u64).to_string()
            };
            vec![
                at.to_string(),
                format!("{}/{}", v("reads_waiting"), v("reads_inflight")),
                format!("{}/{}", v("writes_waiting"), v("writes_inflight")),
                per_s("read_bytes"),
                per_s("write_bytes"),
                v("errors_count").to_string(),
                text.clone(),
            ]
        };
        rows.map(row).collect()
    }

    fn sessions(&self) -> Vec<Vec<String>> {
        let seconds = self.last.at.duration_since(self.before.at).as_secs_f64().max(1e-3);
        let nothing = super::Row::new();
        let mut rows: Vec<(f64, Vec<String>)> = Vec::new();
        for session in &self.last.sessions {
            let v = |name: &str| session.row.get(name).copied().unwrap_or(0);
            let then = self.before.sessions.iter().find(|other| other.row.get("session") == session.row.get("session"));
            let then = then.map_or(&nothing, |then| &then.row);
            let more = |name: &str| v(name).saturating_sub(then.get(name).copied().unwrap_or(0)) as f64 / seconds;
            let p50 = {
                let total: u64 = session.loads.iter().sum();
                let mut below = 0;
                let middle = session.loads.iter().position(|count| {
                    below += count;
                    below * 2 >= total.max(1)
                });
                middle.filter(|_| total > 0).map_or_else(|| "-".into(), |at| format!("<{}", short_ns(1000 << (at + 1))))
            };
            let asked = v("match_blocks_requested_count").max(1) as f64;
            let by: f64 = SORTS[self.sort].1.iter().map(|name| more(name)).sum();
            rows.push((
                by,
                vec![
                    v("session").to_string(),
                    v("instance_id").to_string(),
                    v("pid").to_string(),
                    v("rank").to_string(),
                    format!("{:.0}", more("matches_count")),
                    format!("{:.1}", 100.0 * v("match_blocks_hit_count") as f64 / asked),
                    format!("{:.0}", more("load_blocks_dram_count")),
                    format!("{:.0}", more("load_blocks_ssd_count")),
                    format!("{:.0}", more("commit_blocks_count")),
                    v("leases_count").to_string(),
                    v("loans_count").to_string(),
                    format!("{}/{}", v("submissions_waiting"), v("completions_waiting")),
                    p50,
                ],
            ));
        }
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        rows.into_iter().map(|(_, row)| row).collect()
    }
}

fn rate(now: &Sample, then: &Sample, name: &str) -> f64 {
    let seconds = now.at.duration_since(then.at).as_secs_f64().max(1e-3);
    now.counter(name).saturating_sub(then.counter(name)) as f64 / seconds
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, title: &str, header: &[&str], widths: &[u16], rows: Vec<Vec<String>>) {
    let header =
        TableRow::new(header.iter().map(|name| (*name).to_owned())).style(Style::new().add_modifier(Modifier::BOLD));
    let widths = widths.iter().map(|width| Constraint::Length(*width));
    let table = Table::new(rows.into_iter().map(TableRow::new), widths).header(header);
    frame.render_widget(table.block(Block::new().title(title.to_owned().bold())), area);
}

#[cfg(test)]
mod test {
    use std::sync::atomic::Ordering;

    use kvring_ipc::stats::{Stats, Text};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn drawn(screen: &Screen, server: &Server, health: Health) -> String {
        let mut terminal = Terminal::new(TestBackend::new(130, 34)).unwrap();
        terminal.draw(|frame| screen.draw(frame, server, health)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_rates_tiers_devices_and_sessions_and_says_that_a_server_hangs() {
        let stats = Stats::private(0).unwrap();
        let names = kvring_engine::metrics::names(1);
        let counter = |name: &str| &stats.counters()[names.counters.iter().position(|(n, _)| n == name).unwrap()];
        let text = Text {
            names: names.clone(),
            version: "9.9".into(),
            socket: "/run/kv".into(),
            slot_bytes: 1 << 20,
            devices: vec!["/data: a disk".into()],
            ..Text::default()
        };
        let server = Server { stats: stats.clone(), text };
        counter("host_slots_count").store(200, Ordering::Relaxed);
        counter("host_slots_free_count").store(50, Ordering::Relaxed);
        let session = stats.session(4);
        let column = |name: &str| &session[names.session.iter().position(|n| n == name).unwrap()];
        column("live").store(1, Ordering::Relaxed);
        column("session").store(77, Ordering::Relaxed);
        column("pid").store(4242, Ordering::Relaxed);
        let mut screen = Screen::new(server.sample());
        counter("load_blocks_dram_count").store(3000, Ordering::Relaxed);
        column("load_blocks_dram_count").store(3000, Ordering::Relaxed);
        stats.histogram(5).record(12_000);
        let mut sample = server.sample();
        sample.at = screen.last.at + Duration::from_secs(3);
        screen.look(sample);
        let picture = drawn(&screen, &server, Health::Hung { for_ns: 7_000_000_000 });
        for part in [
            "kvring 9.9 /run/kv HUNG: its shard has not moved for 7.0 s",
            "DRAM 75.0 % of 200 slots, 200.00 MiB",
            "loads: 1,000 blocks/s, 1000.00 MiB/s",
            "load dram",
            "/data: a disk",
            "77",
            "4242",
            "1000",
        ] {
            assert!(picture.contains(part), "no {part:?} in\n{picture}");
        }
    }

    #[test]
    fn a_small_terminal_is_no_reason_to_fail() {
        let server = Server { stats: Stats::private(0).unwrap(), text: Text::default() };
        let screen = Screen::new(server.sample());
        for (width, height) in [(1, 1), (20, 5), (300, 2)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| screen.draw(frame, &server, Health::Died)).unwrap();
        }
    }
}

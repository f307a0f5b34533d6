//! Saved runs, and `kvring report`: one self-contained HTML page of one, or of two compared. No script and nothing from
//! elsewhere: what is drawn is SVG.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use plotters::prelude::*;
use serde_json::{Value, json};

use crate::Outcome;

/// Arguments of `kvring report`.
#[derive(Args)]
pub struct ReportArgs {
    /// One or two runs that were saved with --output; of `bench device`, and of fio, with --output-format=json
    #[arg(required = true, num_args = 1..=2)]
    runs: Vec<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE", default_value = "kvring-report.html")]
    output: PathBuf,
}

const FORMAT: u64 = 1;

/// Whether a run can be saved there: before it is measured.
pub fn check(path: &Path) -> Outcome {
    let opened = std::fs::File::options().create(true).append(true).open(path);
    opened.map_err(|error| format!("--output {}: {error}", path.display()))?;
    Ok(())
}

/// What a run was made with, and on what.
pub fn facts() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let line = |path: &str, name: &str| {
        let text = read(path);
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found.map_or_else(String::new, |rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
    };
    let uname = rustix::system::uname();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("BUILT_FROM_COMMIT"),
        "optimised": !cfg!(debug_assertions),
        "saved_unix_s": now.as_secs(),
        "command": std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>(),
        "host": uname.nodename().to_string_lossy(),
        "kernel": format!("{} {}", uname.release().to_string_lossy(), uname.machine().to_string_lossy()),
        "cpu": line("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": line("/proc/meminfo", "MemTotal"),
        "hugepages_total": line("/proc/meminfo", "HugePages_Total"),
        "transparent_hugepages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    })
}

/// Saves a run with all that is needed to believe it.
pub fn save(path: &Path, kind: &str, report: &Value, settings: Option<Value>) -> Outcome {
    let mut saved = facts();
    for (name, value) in [
        ("kvring_run", FORMAT.into()),
        ("kind", kind.into()),
        ("settings", settings.unwrap_or_else(|| json!({}))),
        ("report", report.clone()),
    ] {
        saved[name] = value;
    }
    std::fs::write(path, serde_json::to_string_pretty(&saved)? + "\n")
        .map_err(|error| format!("--output {}: {error}", path.display()))?;
    eprintln!("saved in {}: kvring report {}", path.display(), path.display());
    Ok(())
}

struct Run {
    name: String,
    saved: Value,
}

fn load(path: &Path) -> Result<Run, String> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| format!("{name}: {error}"))?;
    let saved: Value = serde_json::from_str(&text).map_err(|error| format!("{name}: {error}: not a saved run"))?;
    if let Some(jobs) = saved["jobs"].as_array() {
        return Ok(Run { name, saved: of_jobs(&saved, jobs) });
    }
    match saved["kvring_run"].as_u64() {
        Some(FORMAT) => Ok(Run { name, saved: with_figures(saved) }),
        Some(other) => {
            Err(format!("{name}: format {other}, this program reads {FORMAT}: use the kvring that saved it"))
        }
        None => Err(format!("{name}: not a saved run: save one with --output FILE")),
    }
}

/// A benchmark that has no limits beside its numbers: each of them is a row, by where it stands in the report.
fn with_figures(mut saved: Value) -> Value {
    fn rows(value: &Value, name: &str, into: &mut Vec<Value>) {
        let inner = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}, {part}") };
        match value {
            Value::Number(number) => into.push(json!({"name": name, "value": number, "unit": ""})),
            Value::Object(map) => map
                .iter()
                .filter(|(part, _)| {
                    !["doubts", "ceilings", "samples", "cdf_us", "gb_s_over_time"].contains(&part.as_str())
                })
                .for_each(|(part, value)| rows(value, &inner(part), into)),
            Value::Array(items) => {
                (1..).zip(items).for_each(|(number, item)| rows(item, &inner(&format!("{number}")), into))
            }
            _ => {}
        }
    }
    let has_limits = saved["report"]["ceilings"].as_array().is_some_and(|rows| !rows.is_empty());
    if saved["kind"] == "bench" && !has_limits {
        let mut figures = Vec::new();
        rows(&saved["report"], "", &mut figures);
        saved["report"]["jobs"] = figures.into();
    }
    saved
}

/// A report in fio's schema, as a run: each direction of each job.
fn of_jobs(saved: &Value, jobs: &[Value]) -> Value {
    let (mut rows, mut cdf) = (Vec::new(), serde_json::Map::new());
    for job in jobs {
        for side in ["read", "write"].into_iter().filter(|side| job[*side]["total_ios"].as_u64() > Some(0)) {
            let n = |value: &Value| value.as_f64().unwrap_or(0.0);
            let (name, of) = (format!("{} {side}", job["jobname"].as_str().unwrap_or_default()), &job[side]);
            let percentiles = of["clat_ns"]["percentile"].as_object().into_iter().flatten();
            let mut steps: Vec<[f64; 2]> = percentiles
                .filter_map(|(percent, ns)| Some([ns.as_f64()? / 1e3, percent.parse::<f64>().ok()? / 100.0]))
                .collect();
            steps.sort_by(|a, b| a[1].total_cmp(&b[1]));
            let at = |part: f64| steps.iter().find(|step| step[1] >= part).map_or(f64::NAN, |step| step[0]);
            for (what, value, unit) in [
                ("", n(&of["bw_bytes"]) / 1e9, "GB/s"),
                ("", n(&of["iops"]) / 1e3, "kIOPS"),
                (", p50", at(0.5), "µs"),
                (", p99", at(0.99), "µs"),
            ] {
                rows.push(json!({"name": format!("{name}{what}"), "value": value, "unit": unit}));
            }
            cdf.insert(name, json!(steps));
        }
    }
    let facts = &saved["kvring"];
    let mut run = if facts.is_object() { facts.clone() } else { json!({}) };
    if run["version"].is_null() {
        run["version"] = saved["fio version"].clone();
        run["saved_unix_s"] = saved["timestamp"].clone();
    }
    let settings = if saved["global options"].is_object() { &saved["global options"] } else { &Value::Null };
    (run["kind"], run["settings"]) = ("device".into(), settings.clone());
    run["report"] = json!({"jobs": rows, "cdf_us": cdf});
    run
}

/// Writes the page.
pub fn run(args: &ReportArgs) -> Outcome {
    let runs = args.runs.iter().map(|path| load(path)).collect::<Result<Vec<_>, _>>()?;
    if let [a, b] = &runs[..]
        && a.saved["kind"] != b.saved["kind"]
    {
        return Err(format!(
            "{} is of a {} run and {} of a {} run: compare two of one kind",
            a.name, a.saved["kind"], b.name, b.saved["kind"]
        )
        .into());
    }
    let page = page(&runs)?;
    std::fs::write(&args.output, page).map_err(|error| format!("--output {}: {error}", args.output.display()))?;
    eprintln!("written: {}", args.output.display());
    Ok(())
}

const COLOURS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(214, 88, 20)];
const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}\
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;border-bottom:1px solid #d8dee4;text-align:left}\
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#e8ecf0;width:min(16rem,15vw);height:1rem}.bar div{height:1rem}\
.doubt{background:#fff6dd;padding:.4rem .8rem;border-left:4px solid #d9a400;margin:.3rem 0}svg{max-width:100%;height:auto}\
.facts td+td{overflow-wrap:anywhere}td.n{white-space:nowrap}code{background:#f0f2f4;padding:0 .25rem}h2{margin-top:2.2rem}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn page(runs: &[Run]) -> Result<String, Box<dyn std::error::Error>> {
    let mut out = String::new();
    let title = runs.iter().map(|run| escaped(&run.name)).collect::<Vec<_>>().join(" and ");
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>kvring: {title}</title><style>{STYLE}</style><body><h1>kvring: {title}</h1>"
    );
    for (run, colour) in runs.iter().zip(COLOURS) {
        let doubts = run.saved["report"]["doubts"].as_array().cloned().unwrap_or_default();
        for doubt in doubts.iter().filter_map(Value::as_str) {
            let _ = write!(
                out,
                "<p class=\"doubt\"><b style=\"color:{}\">{}</b>: {}</p>",
                css(colour),
                escaped(&run.name),
                escaped(doubt)
            );
        }
    }
    if runs.len() == 2 {
        compared(&mut out, &runs[0], &runs[1]);
    }
    roofline(&mut out, runs);
    jobs(&mut out, runs);
    hit_ratios(&mut out, runs);
    throughput(&mut out, runs)?;
    for (name, what) in
        [("request", "Whole requests, from when they were due"), ("load", "Loads"), ("match", "Matches")]
    {
        cdf(&mut out, runs, name, what)?;
    }
    for name in names(runs, "gb_s_over_time") {
        over_time(&mut out, runs, &name)?;
    }
    // Of jobs, and of what else was timed.
    for name in names(runs, "cdf_us").into_iter().filter(|name| !["request", "load", "match"].contains(&name.as_str()))
    {
        cdf(&mut out, runs, &name, &escaped(&name))?;
    }
    told(&mut out, runs);
    out.push_str("</body></html>\n");
    Ok(out)
}

/// What either run has under a name, in one order.
fn names(runs: &[Run], what: &str) -> std::collections::BTreeSet<String> {
    let of = |run: &Run| -> Vec<String> {
        run.saved["report"][what].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect()
    };
    runs.iter().flat_map(of).collect()
}

fn css(colour: RGBColor) -> String {
    format!("rgb({},{},{})", colour.0, colour.1, colour.2)
}

/// What was measured, and on what.
fn told(out: &mut String, runs: &[Run]) {
    out.push_str("<h2>What was run</h2><table class=\"facts\"><tr><th></th>");
    for run in runs {
        let _ = write!(out, "<th>{}</th>", escaped(&run.name));
    }
    out.push_str("</tr>");
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(words) => words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let facts = [
        "command",
        "version",
        "commit",
        "optimised",
        "host",
        "kernel",
        "cpu",
        "cpus",
        "memory",
        "hugepages_total",
        "transparent_hugepages",
        "governor",
        "saved_unix_s",
    ];
    for fact in facts {
        let _ = write!(out, "<tr><td>{fact}</td>");
        for run in runs {
            let _ = write!(out, "<td>{}</td>", escaped(&text(&run.saved[fact])));
        }
        out.push_str("</tr>");
    }
    let names = runs[0].saved["settings"].as_object().into_iter().flatten().map(|(name, _)| name);
    for name in
        names.filter(|name| runs.len() == 1 || runs[0].saved["settings"][*name] != runs[1].saved["settings"][*name])
    {
        let _ = write!(out, "<tr><td>{}</td>", escaped(name));
        for run in runs {
            let _ = write!(out, "<td>{}</td>", escaped(&text(&run.saved["settings"][name])));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

/// Percent of each ceiling.
fn roofline(out: &mut String, runs: &[Run]) {
    let mut rows = String::new();
    for (run, colour) in runs.iter().zip(COLOURS) {
        for row in run.saved["report"]["ceilings"].as_array().into_iter().flatten() {
            let n = |field: &str| row[field].as_f64().unwrap_or(0.0);
            let s = |field: &str| escaped(row[field].as_str().unwrap_or_default());
            let share = 100.0 * n("share");
            let _ = write!(
                rows,
                "<tr><td>{}</td><td class=\"n\">{} {}</td><td class=\"n\">{} {}</td><td><div class=\"bar\"><div style=\"width:{:.1}%;background:{}\"></div></div></td><td class=\"n\">{share:.0} %</td><td>{}</td></tr>",
                s("name"),
                n("value"),
                s("unit"),
                n("limit"),
                s("unit"),
                share.clamp(0.0, 100.0),
                css(colour),
                s("limit_is"),
            );
        }
    }
    if !rows.is_empty() {
        let _ = write!(
            out,
            "<h2>How close to the limit</h2><p>Each number beside what bounds it, measured in the same run.</p><table><tr><th></th><th>kvring</th><th>limit</th><th></th><th></th><th>the limit is</th></tr>{rows}</table>"
        );
    }
}

/// What jobs have measured, without a limit beside it.
fn jobs(out: &mut String, runs: &[Run]) {
    let mut rows = String::new();
    for row in runs.iter().flat_map(|run| run.saved["report"]["jobs"].as_array().into_iter().flatten()) {
        let (name, unit) = (row["name"].as_str().unwrap_or_default(), row["unit"].as_str().unwrap_or_default());
        let value = plain(row["value"].as_f64().unwrap_or(f64::NAN));
        let _ = write!(rows, "<tr><td>{}</td><td class=\"n\">{value} {}</td></tr>", escaped(name), escaped(unit));
    }
    // Two are compared row by row.
    if !rows.is_empty() && runs.len() == 1 {
        let _ = write!(out, "<h2>Figures</h2><table>{rows}</table>");
    }
}

fn hit_ratios(out: &mut String, runs: &[Run]) {
    let mut rows = String::new();
    for (run, colour) in runs.iter().zip(COLOURS) {
        let report = &run.saved["report"];
        for (name, field) in [
            ("measured", "hit_ratio"),
            ("Belady's optimum for this capacity", "hit_ratio_belady"),
            ("infinite cache", "hit_ratio_infinite"),
        ] {
            if let Some(ratio) = report[field].as_f64() {
                let _ = write!(
                    rows,
                    "<tr><td>{}: {name}</td><td><div class=\"bar\"><div style=\"width:{:.1}%;background:{}\"></div></div></td><td class=\"n\">{:.1} %</td></tr>",
                    escaped(&run.name),
                    100.0 * ratio,
                    css(colour),
                    100.0 * ratio
                );
            }
        }
    }
    if !rows.is_empty() {
        let _ = write!(out, "<h2>Hit ratio</h2><table>{rows}</table>");
    }
}

/// Steps of a series of counts: seconds, and GB/s loaded and stored since the step before.
fn rates(report: &Value) -> Vec<[f64; 3]> {
    let gb = report["block_bytes"].as_f64().unwrap_or(0.0) / 1e9;
    let point =
        |value: &Value| -> Option<[f64; 3]> { Some([value[0].as_f64()?, value[1].as_f64()?, value[2].as_f64()?]) };
    let series: Vec<_> = report["series"].as_array().into_iter().flatten().filter_map(point).collect();
    let step = |two: &[[f64; 3]]| {
        let seconds = (two[1][0] - two[0][0]).max(1e-6);
        [two[1][0], (two[1][1] - two[0][1]) * gb / seconds, (two[1][2] - two[0][2]) * gb / seconds]
    };
    series.windows(2).map(step).collect()
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn throughput(out: &mut String, runs: &[Run]) -> Drawn {
    for (at, what) in [(1, "Loaded"), (2, "Stored")] {
        let lines: Vec<Vec<(f64, f64)>> = runs
            .iter()
            .map(|run| rates(&run.saved["report"]).iter().map(|step| (step[0], step[at])).collect())
            .collect();
        let last = lines.iter().flatten().map(|(x, _)| *x).fold(0.0, f64::max);
        let most = lines.iter().flatten().map(|(_, y)| *y).fold(0.0, f64::max);
        if last > 0.0 && most > 0.0 {
            let _ = write!(out, "<h2>{what}, over time</h2>");
            out.push_str(&chart(runs, &lines, "seconds", "GB/s", (0.0..last).into(), 0.0..most * 1.1)?);
        }
    }
    Ok(())
}

/// GB a second of the measurements of one thing, one after another.
fn over_time(out: &mut String, runs: &[Run], name: &str) -> Drawn {
    let line = |run: &Run| -> Vec<(f64, f64)> {
        let points = run.saved["report"]["gb_s_over_time"][name].as_array().into_iter().flatten();
        points.filter_map(|point| Some((point[0].as_f64()?, point[1].as_f64()?))).collect()
    };
    let lines: Vec<_> = runs.iter().map(line).collect();
    let end = |at: fn(&(f64, f64)) -> f64| lines.iter().flatten().map(at).fold(0.0, f64::max);
    let (last, most) = (end(|point| point.0), end(|point| point.1));
    if last > 0.0 && most > 0.0 {
        let _ = write!(
            out,
            "<h2>{}, over time</h2><p>Its rounds one after another; what was measured between them is left out.</p>",
            escaped(name)
        );
        out.push_str(&chart(runs, &lines, "seconds", "GB/s", (0.0..last).into(), 0.0..most * 1.1)?);
    }
    Ok(())
}

fn cdf(out: &mut String, runs: &[Run], name: &str, what: &str) -> Drawn {
    let line = |run: &Run| -> Vec<(f64, f64)> {
        let steps = run.saved["report"]["cdf_us"][name].as_array().into_iter().flatten();
        // The tail is what matters: the axis is of nines.
        let nines = |quantile: f64| -(1.0 - quantile.min(0.99999)).log10();
        steps.filter_map(|step| Some((step[0].as_f64()?.max(0.1), nines(step[1].as_f64()?)))).collect()
    };
    let lines: Vec<_> = runs.iter().map(line).collect();
    let (least, most) =
        lines.iter().flatten().fold((f64::MAX, 0.0f64), |(least, most), (x, _)| (least.min(*x), most.max(*x)));
    if most > 0.0 {
        let _ = write!(
            out,
            "<h2>{what}: how long</h2><p>The part that took no longer than so many microseconds (logarithmic); each step up is another nine.</p>"
        );
        let x = Axis::Log(least..(most * 1.05).max(least * 1.5));
        out.push_str(&chart(runs, &lines, "µs", "part of all", x, 0.0..NINES)?);
    }
    Ok(())
}

/// Where an axis of nines ends: 99.999 %.
const NINES: f64 = 5.0;

/// A number of nines as a part of all.
fn nines(count: f64) -> String {
    let percent = 100.0 * (1.0 - 10f64.powf(-count));
    format!("{percent:.*} %", (count - 2.0).clamp(0.0, 3.0).ceil() as usize)
}

/// Four digits, and no more zeros than are needed.
fn plain(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let digits = (3 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Where a logarithmic axis is marked, so that no two numbers meet: at 1, 2 and 5 of each decade, or of many decades at
/// their beginnings; of a part of one, in even steps.
fn marks(range: &std::ops::Range<f64>) -> Vec<f64> {
    const MOST: usize = 10;
    let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let of = |digits: &[f64]| -> Vec<f64> {
        let all = decades.clone().flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)));
        all.filter(|mark| range.contains(mark)).collect()
    };
    let even = || -> Vec<f64> {
        let step = 10f64.powf(((range.end - range.start) / 2.0).log10().floor());
        let first = (range.start / step).ceil();
        let marks = (0..).map(|at| (first + f64::from(at)) * step).take_while(|mark| range.contains(mark));
        let marks: Vec<f64> = marks.collect();
        let every = marks.len().div_ceil(MOST / 2).max(1);
        marks.into_iter().step_by(every).collect()
    };
    let [fine, coarse] = [of(&[1.0, 2.0, 5.0]), of(&[1.0])];
    match fine.len() {
        0..=2 => even(),
        3..=MOST => fine,
        _ => coarse,
    }
}

enum Axis {
    Linear(std::ops::Range<f64>),
    Log(std::ops::Range<f64>),
}

impl From<std::ops::Range<f64>> for Axis {
    fn from(range: std::ops::Range<f64>) -> Self {
        Self::Linear(range)
    }
}

fn chart(
    runs: &[Run],
    lines: &[Vec<(f64, f64)>],
    x_is: &str,
    y_is: &str,
    x: Axis,
    y: std::ops::Range<f64>,
) -> Result<String, Box<dyn std::error::Error>> {
    // Whose line is whose, above it: inside, it would hide some of them.
    let name =
        |(run, colour): (&Run, RGBColor)| format!("<b style=\"color:{}\">{}</b>", css(colour), escaped(&run.name));
    let whose: Vec<String> = runs.iter().zip(COLOURS).map(name).collect();
    let whose = if runs.len() > 1 { format!("<p>{}</p>", whose.join(", ")) } else { String::new() };
    let mut svg = String::new();
    let of_nines = y.end == NINES;
    let y_label = |y: &f64| if of_nines { nines(*y) } else { plain(*y) };
    {
        let area = SVGBackend::with_string(&mut svg, (860, 320)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(&area);
        builder.margin(12).x_label_area_size(42).y_label_area_size(78);
        macro_rules! draw {
            ($x:expr) => {{
                let mut chart = builder.build_cartesian_2d($x, y)?;
                chart
                    .configure_mesh()
                    .x_desc(x_is)
                    .y_desc(y_is)
                    .light_line_style(WHITE)
                    .label_style(("sans-serif", 13))
                    .axis_desc_style(("sans-serif", 13))
                    // Of nines, whole ones.
                    .y_labels(if of_nines { NINES as usize + 1 } else { 10 })
                    .y_label_formatter(&y_label)
                    .x_label_formatter(&|x: &f64| plain(*x))
                    .draw()?;
                for (line, colour) in lines.iter().zip(COLOURS) {
                    chart.draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(2)))?;
                }
            }};
        }
        match x {
            Axis::Linear(range) => draw!(range),
            Axis::Log(range) => {
                let marks = marks(&range);
                draw!(range.log_scale().with_key_points(marks));
            }
        }
        area.present()?;
    }
    Ok(whose + &svg)
}

/// Probability that two samples come from one distribution (Mann and Whitney, 1947; two-sided, normal approximation with
/// correction for continuity, ties by midranks). None for fewer than four of either.
fn p_value(a: &[f64], b: &[f64]) -> Option<f64> {
    let (n, m) = (a.len() as f64, b.len() as f64);
    if a.len() < 4 || b.len() < 4 {
        return None;
    }
    let wins = |x: f64| {
        b.iter()
            .map(|y| {
                if x > *y {
                    1.0
                } else if x == *y {
                    0.5
                } else {
                    0.0
                }
            })
            .sum::<f64>()
    };
    let u: f64 = a.iter().map(|x| wins(*x)).sum();
    // Ties make the spread smaller.
    let mut all: Vec<f64> = a.iter().chain(b).copied().collect();
    all.sort_by(f64::total_cmp);
    let ties: f64 = all.chunk_by(|x, y| x == y).map(|same| (same.len() as f64).powi(3) - same.len() as f64).sum();
    let deviation = (n * m / 12.0 * (n + m + 1.0 - ties / ((n + m) * (n + m - 1.0)))).sqrt();
    if deviation == 0.0 {
        return Some(1.0);
    }
    let z = ((u - n * m / 2.0).abs() - 0.5).max(0.0) / deviation;
    Some(2.0 * (1.0 - normal_cdf(z)))
}

/// Abramowitz and Stegun, 26.2.17: to 7.5e-8.
fn normal_cdf(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let poly =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    1.0 - (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
    if sorted.len() % 2 == 1 {
        at(sorted.len() / 2)
    } else {
        (at(sorted.len() / 2) + at((sorted.len() / 2).wrapping_sub(1))) / 2.0
    }
}

/// Two runs, number by number, and whether they differ.
fn compared(out: &mut String, a: &Run, b: &Run) {
    let mut rows = String::new();
    let mut row = |name: &str, unit: &str, ours: f64, theirs: f64, samples: [&[f64]; 2]| {
        let unit = escaped(unit);
        let change = if ours == theirs { 0.0 } else { 100.0 * (theirs / ours - 1.0) };
        let sure = match p_value(samples[0], samples[1]) {
            Some(p) if p < 0.0001 => "yes (p < 0.0001)".to_owned(),
            Some(p) if p < 0.01 => format!("yes (p = {p:.4})"),
            Some(p) if p < 0.05 => format!("probably (p = {p:.3})"),
            Some(p) => format!("no: noise does that (p = {p:.2})"),
            None => "not known: too few rounds".to_owned(),
        };
        let _ = write!(
            rows,
            "<tr><td>{}</td><td class=\"n\">{} {unit}</td><td class=\"n\">{} {unit}</td><td class=\"n\">{change:+.1} %</td><td>{sure}</td></tr>",
            escaped(name),
            plain(ours),
            plain(theirs)
        );
    };
    let (ra, rb) = (&a.saved["report"], &b.saved["report"]);
    let list =
        |row: &Value| row["samples"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect::<Vec<_>>();
    let rows_of = |report: &Value| -> Vec<Value> {
        ["ceilings", "jobs"].iter().flat_map(|list| report[*list].as_array().cloned().unwrap_or_default()).collect()
    };
    let theirs = rows_of(rb);
    for one in &rows_of(ra) {
        let other = theirs.iter().find(|other| other["name"] == one["name"] && other["unit"] == one["unit"]);
        if let (Some(other), Some(name)) = (other, one["name"].as_str()) {
            let v = |row: &Value| row["value"].as_f64().unwrap_or(f64::NAN);
            row(name, one["unit"].as_str().unwrap_or_default(), v(one), v(other), [&list(one), &list(other)]);
        }
    }
    for (at, name) in [(1, "loaded"), (2, "stored")] {
        // Windows of a quarter of a second are not independent: every fourth.
        let steps = |report: &Value| rates(report).iter().map(|step| step[at]).step_by(4).collect::<Vec<_>>();
        let (x, y) = (steps(ra), steps(rb));
        if !x.is_empty() && !y.is_empty() {
            row(name, "GB/s", median(&x), median(&y), [&x, &y]);
        }
    }
    let spans = |value: &Value| value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect::<Vec<_>>();
    for (name, field, unit) in [
        ("hit ratio", "hit_ratio", ""),
        ("requests", "requests_per_s", "/s"),
        ("server's CPU time", "server_cpu_s", "s"),
    ] {
        if let (Some(x), Some(y)) = (ra[field].as_f64(), rb[field].as_f64()) {
            row(name, unit, x, y, [&spans(&ra["windows"][field]), &spans(&rb["windows"][field])]);
        }
    }
    for (name, field) in [("request", "request_us"), ("load", "load_us"), ("match", "match_us")] {
        for quantile in ["p50", "p99"] {
            if let (Some(x), Some(y)) = (ra[field][quantile].as_f64(), rb[field][quantile].as_f64()) {
                let spans = [ra, rb].map(|report| spans(&report["windows"][field][quantile]));
                row(&format!("{name}, {quantile}"), "µs", x, y, [&spans[0], &spans[1]]);
            }
        }
    }
    let _ = write!(
        out,
        "<h2>Compared</h2><table><tr><th></th><th style=\"color:{}\">{}</th><th style=\"color:{}\">{}</th><th>change</th><th>a difference?</th></tr>{rows}</table><p>Mann and Whitney's test: over rounds, every fourth quarter of a second, or, for what requests saw, up to 32 spans of the run; the numbers are those of the whole run, or medians. Spans of one run are alike or not by what was asked in them: where a cache warms up, small differences drown.</p>",
        css(COLOURS[0]),
        escaped(&a.name),
        css(COLOURS[1]),
        escaped(&b.name)
    );
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_difference_is_told_from_noise() {
        let a: Vec<f64> = (0..12).map(|i| 10.0 + f64::from(i % 4) * 0.1).collect();
        let shifted: Vec<f64> = a.iter().map(|x| x + 1.0).collect();
        assert!(p_value(&a, &shifted).unwrap() < 0.001);
        assert!(p_value(&a, &a).unwrap() > 0.9);
        assert_eq!(p_value(&a[..3], &shifted), None);
        // Tables of U: for 5 and 5 all on one side p is 0.008 exactly, 0.012 by the approximation.
        let p = p_value(&[1.0, 2.0, 3.0, 4.0, 5.0], &[6.0, 7.0, 8.0, 9.0, 10.0]).unwrap();
        assert!((0.008..0.013).contains(&p), "{p}");
        assert!((normal_cdf(1.959_964) - 0.975).abs() < 1e-6);
    }

    #[test]
    fn no_two_marks_of_an_axis_meet() {
        assert_eq!(marks(&(3.0..700.0)), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]);
        assert_eq!(marks(&(0.5..2e5)), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        assert_eq!(marks(&(6800.0..11000.0)), [7000.0, 8000.0, 9000.0, 10000.0]);
        for (from, to) in [(0.1, 0.2), (1.0, 1.6), (90.0, 120.0), (5.0, 5e6), (1e4, 3e4), (9_990.0, 15_000.0)] {
            let marks = marks(&(from..to));
            assert!((2..=10).contains(&marks.len()), "{from} to {to}: {marks:?}");
            // Of 750 pixels.
            let at = |mark: f64| 750.0 * (mark / from).log10() / f64::log10(to / from);
            assert!(marks.windows(2).all(|two| at(two[1]) - at(two[0]) > 45.0), "{from} to {to}: {marks:?}");
        }
    }

    #[test]
    fn figures_without_limits_are_rows_too() {
        let report = json!({"ceilings": [], "doubts": ["x"], "read": {"off_gb_s": 3.5, "samples": [1, 2]}, "rows": [{"blocks": 10}]});
        let saved = with_figures(json!({"kvring_run": 1, "kind": "bench", "report": report}));
        let run = |name: &str| Run { name: name.into(), saved: saved.clone() };
        let one = page(&[run("a.json")]).unwrap();
        assert!(one.contains("<td>read, off_gb_s</td><td class=\"n\">3.5 </td>"), "{one}");
        assert!(one.contains("<td>rows, 1, blocks</td>") && !one.contains("samples"), "{one}");
        assert!(page(&[run("a.json"), run("b.json")]).unwrap().contains("<td>read, off_gb_s</td><td class=\"n\">3.5 "));
    }

    #[test]
    fn a_page_has_what_was_saved_and_nothing_from_elsewhere() {
        let report = json!({
            "doubts": ["a <doubt>"], "hit_ratio": 0.5, "hit_ratio_belady": 0.6, "hit_ratio_infinite": 0.9, "block_bytes": 1_000_000_000u64,
            "series": (0..40).map(|i| json!([f64::from(i) * 0.25, i * 2, i])).collect::<Vec<_>>(),
            "request_us": {"p50": 12.0, "p99": 90.0},
            "windows": {"hit_ratio": [0.5, 0.5, 0.4, 0.6, 0.5], "request_us": {"p50": [11.0, 12.0, 13.0, 12.0], "p99": [88.0]}},
            "cdf_us": {"request": [[10.0, 0.5], [100.0, 0.9], [1000.0, 0.999]], "ping round trip": [[0.2, 0.5], [3.0, 1.0]]},
            "gb_s_over_time": {"memcpy": [[0.1, 10.0], [0.2, 11.0]]},
            "ceilings": [{"name": "x", "value": 8.0, "limit": 10.0, "unit": "GB/s", "limit_is": "memcpy", "share": 0.8, "samples": [8.0, 8.1, 7.9, 8.0]}],
        });
        let run = |name: &str| Run {
            name: name.into(),
            saved: json!({"kvring_run": 1, "kind": "cache", "report": report, "settings": {"a": "1"}}),
        };
        let page = page(&[run("a.json"), run("b.json")]).unwrap();
        for part in [
            "a &lt;doubt&gt;",
            "Belady",
            "80 %",
            "<svg",
            "no: noise does that",
            "8 GB/s",
            "hit ratio",
            "ping round trip: how long",
            "memcpy, over time",
        ] {
            assert!(page.contains(part), "no {part:?}");
        }
        assert!(
            !page.contains("<script")
                && !page.contains("http://") | page.contains("http://www.w3.org/2000/svg")
                && !page.contains("https://")
        );
        let of = |name: &str| page.split(&format!("<td>{name}</td>")).nth(1).unwrap().split("</tr>").next().unwrap();
        assert!(of("hit ratio").contains("noise does that") && of("request, p50").contains("noise does that"));
        assert!(of("request, p99").contains("too few rounds"), "one span is none");
        assert_eq!(rates(&report)[0], [0.25, 8.0, 4.0]);
        assert_eq!([0.0, 1.0, 2.0, 3.0, 4.0].map(nines), ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
        assert_eq!([1234.5678, 0.25, 8.0, 100_000.0].map(plain), ["1235", "0.25", "8", "100000"]);
    }
}

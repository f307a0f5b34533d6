//! Request traces: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, as
//! Mooncake published them (FAST'25, "Mooncake: Trading More Storage for Less Computation"). Each
//! hash id names one block after everything before it.

use std::io::{BufRead, BufReader};
use std::path::Path;

use kvring_ipc::key::{BlockKey, Namespace, next_key};
use kvring_ipc::wire::MATCH_BLOCKS_MAX;
use serde::Deserialize;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRequest {
    /// When it arrived, in microseconds from the start.
    pub timestamp_us: u64,
    /// Its blocks.
    pub hash_ids: Vec<u64>,
}

#[derive(Deserialize)]
struct Line {
    timestamp: serde_json::Number,
    #[serde(rename = "input_length")]
    _input_length: u64,
    #[serde(rename = "output_length")]
    _output_length: u64,
    hash_ids: Vec<u64>,
}

/// A line that is no request, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error(
    "{file}{}: {problem}: each line must be an object with timestamp (ms), input_length, output_length and hash_ids (1 to {MATCH_BLOCKS_MAX} whole numbers)",
    at(*line)
)]
pub struct TraceError {
    file: String,
    line: usize,
    problem: String,
}

/// `:line`, unless it is the file as a whole.
fn at(line: usize) -> String {
    if line == 0 { String::new() } else { format!(":{line}") }
}

/// Longest line that is read: 8192 ids of 20 digits fit several times.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Reads up to `limit` requests.
///
/// # Errors
/// The first line that is no request.
pub fn read(path: &Path, limit: usize) -> Result<Vec<TraceRequest>, TraceError> {
    let file_name = path.display().to_string();
    let wrong = |line: usize, problem: String| TraceError { file: file_name.clone(), line, problem };
    let file = std::fs::File::open(path).map_err(|error| wrong(0, format!("cannot be read: {error}")))?;
    let mut reader = BufReader::new(file);
    let mut requests = Vec::new();
    let mut bytes = Vec::new();
    for number in 1.. {
        if requests.len() == limit {
            break;
        }
        bytes.clear();
        let mut bounded = std::io::Read::take(&mut reader, LINE_BYTES_MAX);
        let length = bounded.read_until(b'\n', &mut bytes).map_err(|error| wrong(number, error.to_string()))?;
        if length == 0 {
            break;
        }
        if length as u64 == LINE_BYTES_MAX {
            return Err(wrong(number, format!("longer than {LINE_BYTES_MAX} bytes")));
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let line: Line =
            serde_json::from_slice(bytes.trim_ascii()).map_err(|error| wrong(number, error.to_string()))?;
        let timestamp = line.timestamp.as_f64().filter(|ms| ms.is_finite() && (0.0..1e15).contains(ms));
        let Some(timestamp) = timestamp else { return Err(wrong(number, format!("timestamp = {}", line.timestamp))) };
        if line.hash_ids.is_empty() || line.hash_ids.len() > MATCH_BLOCKS_MAX as usize {
            return Err(wrong(number, format!("{} hash_ids", line.hash_ids.len())));
        }
        requests.push(TraceRequest { timestamp_us: (timestamp * 1000.0) as u64, hash_ids: line.hash_ids });
    }
    if requests.is_empty() {
        return Err(wrong(0, "holds no request".into()));
    }
    Ok(requests)
}

/// Where replays keep their blocks.
pub fn namespace() -> Namespace {
    Namespace::default().model("replay")
}

/// The keys of a request's blocks: its hash ids taken as the blocks' tokens.
pub fn keys(request: &TraceRequest) -> Vec<BlockKey> {
    let mut parent = namespace().root();
    let key = |id: &u64| {
        parent = next_key(parent, &[*id as u32, (*id >> 32) as u32], &[]);
        parent
    };
    request.hash_ids.iter().map(key).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<TraceRequest>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path(), 10).map_err(|error| error.to_string())
    }

    #[test]
    fn a_trace_is_read_and_equal_prefixes_have_equal_keys() {
        let line = |ids: &str| {
            format!("{{\"timestamp\": 27, \"input_length\": 9, \"output_length\": 5, \"hash_ids\": {ids}}}\n")
        };
        let requests = read_text(&(line("[0, 1, 2]") + "\n" + &line("[0, 1, 9]"))).unwrap();
        let (a, b) = (keys(&requests[0]), keys(&requests[1]));
        assert_eq!(requests[0].timestamp_us, 27_000);
        assert!(a[..2] == b[..2] && a[2] != b[2]);
    }

    #[test]
    fn a_bad_line_is_named_with_its_number_and_the_remedy() {
        let good = "{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[1]}\n";
        let ids = format!("[{}1]", "1,".repeat(9000));
        let cases = [
            ("{\"timestamp\":0,\"input_len", "EOF"),
            ("not json", "expected"),
            ("{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[]}", "0 hash_ids"),
            ("{\"timestamp\":-5,\"input_length\":1,\"output_length\":1,\"hash_ids\":[1]}", "timestamp = -5"),
            ("{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[-1]}", "invalid value"),
            ("{\"timestamp\":0,\"input_length\":1,\"output_length\":1}", "hash_ids"),
            (
                &format!("{{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":{ids}}}"),
                "9001 hash_ids",
            ),
            (&"x".repeat(2 << 20), "longer than"),
            ("\u{0}\u{1}\u{ff}", "expected value"),
        ];
        for (bad, why) in cases {
            let error = read_text(&format!("{good}{bad}\n")).unwrap_err();
            assert!(error.contains(":2: ") && error.contains(why) && error.contains("each line must be"), "{error}");
        }
        assert!(read_text("").unwrap_err().contains("holds no request"));
    }
}

//! Any bytes as a datagram on the control socket, to the server and to a client. Nothing panics; what is
//! understood can be said again; a layout that passes its check is one that can be served.
#![no_main]

use kvring_engine::limits::SECTOR_BYTES;
use kvring_ipc::handshake::{Reply, Request, parse};
use kvring_ipc::layout::Layout;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Says it again; the other side understands the same.
fn again<T: Serialize + DeserializeOwned>(message: &T) {
    let text = serde_json::to_vec(message).expect("what was read can be written");
    // What escapes can grow past the limit: that is refused when it is sent.
    if let Ok(same) = parse::<T>(&text) {
        assert_eq!(serde_json::to_vec(&same).expect("as before"), text);
    }
}

fn judge(theirs: &Layout) {
    let ours = Layout { tp_size: 2, model: "m".into(), ..Layout::opaque(4096) };
    for layout in [&ours, theirs] {
        assert!(layout.differences(layout).is_empty());
    }
    let differences = ours.differences(theirs);
    assert_eq!(differences.is_empty(), ours == *theirs, "what differs has a name");
    assert_eq!(differences.len(), theirs.differences(&ours).len());
    assert_eq!(ours.fingerprint() == theirs.fingerprint(), ours == *theirs);
    match theirs.check(SECTOR_BYTES) {
        Ok(()) => {
            assert!(theirs.block_bytes >= SECTOR_BYTES && theirs.block_bytes.is_multiple_of(SECTOR_BYTES));
            assert!(theirs.block_bytes <= 1 << 30 && (1..=32).contains(&theirs.tp_size));
        }
        Err(why) => {
            let fields =
                ["block_bytes = ", "tp_size = ", "key_contract = ", "model has ", "dtype has ", "kv_layout has "];
            let named = fields.iter().any(|name| why.starts_with(name));
            assert!(named, "the field is named: {why}");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = parse::<Request>(data) {
        again(&request);
        if let Request::Attach(attach) = &request
            && let Some(layout) = &attach.layout
        {
            judge(layout);
        }
    }
    match parse::<Reply>(data) {
        // Any JSON: a number may lose its last bit on the way, so it is not compared.
        Ok(Reply::Stats(stats)) => drop(stats.to_string()),
        Ok(reply) => again(&reply),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

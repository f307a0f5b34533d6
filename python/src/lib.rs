//! `kvring._native`: what Python calls. Thin: an [`Instance`](kvring_ipc::instance::Instance) for an
//! engine's scheduler, an [`Agent`](kvring_gpu::agent::Agent) for each of its workers, and keys.
//! Documented, with types, in `kvring/__init__.py`.
//!
//! No call holds the GIL while it waits, none raises for a server that is gone: they answer "miss".

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvring_gpu::agent;
use kvring_gpu::backend::cuda::{CudaBackend, Options as CudaOptions};
use kvring_gpu::backend::host::HostBackend;
use kvring_gpu::backend::tensors::{HostTensors, Tensors};
use kvring_gpu::layout::MemoryMap;
use kvring_gpu::plan::Calibration;
use kvring_ipc::client;
use kvring_ipc::config::{Config, Loaded};
use kvring_ipc::events::{Event, Events};
use kvring_ipc::instance;
use kvring_ipc::key::{self, BlockKey};
use kvring_ipc::layout::Layout;
use kvring_ipc::wire::LeaseId;
use pyo3::exceptions::{PyConnectionError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

const KEY_BYTES: usize = 16;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic inside is a bug of ours that has been raised; what it left is still consistent to drop.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keys_of(bytes: &[u8]) -> PyResult<Vec<BlockKey>> {
    let (keys, rest) = bytes.as_chunks::<KEY_BYTES>();
    if !rest.is_empty() {
        let text = format!("keys = {} bytes: a multiple of {KEY_BYTES} is expected", bytes.len());
        return Err(PyValueError::new_err(text));
    }
    Ok(keys.iter().map(key_of).collect())
}

fn key_of(bytes: &[u8; KEY_BYTES]) -> BlockKey {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    BlockKey::from_words([word(0), word(8)])
}

fn one_key(bytes: &[u8]) -> PyResult<BlockKey> {
    let bytes = bytes.try_into();
    bytes.map(key_of).map_err(|_| PyValueError::new_err(format!("a key has {KEY_BYTES} bytes")))
}

fn to_bytes(keys: &[BlockKey]) -> Vec<u8> {
    keys.iter().flat_map(|key| key.to_words()).flat_map(u64::to_le_bytes).collect()
}

fn config_of(settings: Vec<(String, String)>) -> PyResult<Config> {
    Ok(load(&settings)?.config)
}

/// Reads a configuration; an argument is no flag here.
fn load(settings: &[(String, String)]) -> PyResult<Loaded> {
    Config::load(settings, None, std::env::vars()).map_err(|mut error| {
        if error.origin == "a flag" || error.origin.starts_with("--") {
            error.origin = "an argument, or kv_connector_extra_config".into();
        }
        PyValueError::new_err(error.to_string())
    })
}

fn open(
    py: Python<'_>,
    layout: Option<&str>,
    settings: Vec<(String, String)>,
    rank: u32,
    token: Option<String>,
) -> PyResult<instance::Instance> {
    let config = config_of(settings)?;
    let layout: Option<Layout> = layout
        .map(serde_json::from_str)
        .transpose()
        .map_err(|error| PyValueError::new_err(format!("layout: {error}")))?;
    let token = token.unwrap_or_else(instance::random_token);
    py.detach(|| instance::Instance::open_with_token(config, layout, rank, token))
        .map_err(|error| PyConnectionError::new_err(error.to_string()))
}

/// A prefix that stays resident until released, or until it expires.
#[pyclass(frozen, module = "kvring")]
struct Lease(client::Lease);

#[pymethods]
impl Lease {
    /// The lease's name, for an Agent of the same instance.
    #[getter]
    fn id(&self) -> u64 {
        self.0.id.0
    }
    /// CLOCK_MONOTONIC, in ns.
    #[getter]
    fn expires_at_ns(&self) -> u64 {
        self.0.expires_at_ns
    }
}

/// What an engine's scheduler holds. Every call is bounded by `client_wait_ms`.
#[pyclass(frozen, module = "kvring")]
struct Instance(Mutex<Option<instance::Instance>>);

impl Instance {
    /// Runs a call without the GIL; a closed instance misses.
    fn call<T: Send>(&self, py: Python<'_>, miss: T, call: impl FnOnce(&mut instance::Instance) -> T + Send) -> T {
        py.detach(|| match &mut *lock(&self.0) {
            Some(instance) => call(instance),
            None => miss,
        })
    }
}

#[pymethods]
impl Instance {
    #[new]
    #[pyo3(signature = (settings, token=None, layout=None, rank=0))]
    fn new(
        py: Python<'_>,
        settings: Vec<(String, String)>,
        token: Option<String>,
        layout: Option<&str>,
        rank: u32,
    ) -> PyResult<Self> {
        Ok(Self(Mutex::new(Some(open(py, layout, settings, rank, token)?))))
    }

    /// (leading blocks that are resident, the lease that keeps them so or None).
    #[pyo3(name = "match")]
    fn match_prefix(&self, py: Python<'_>, keys: &[u8]) -> PyResult<(u32, Option<Lease>)> {
        let keys = keys_of(keys)?;
        let matched = self.call(py, client::Matched::MISS, |instance| instance.match_prefix(&keys));
        Ok((matched.blocks, matched.lease.map(Lease)))
    }

    fn release(&self, py: Python<'_>, lease: &Lease) {
        let lease = lease.0;
        self.call(py, (), |instance| instance.release(lease));
    }

    fn prefetch(&self, py: Python<'_>, lease: &Lease, first: u32, count: u32) {
        let lease = lease.0;
        self.call(py, (), |instance| instance.prefetch(lease, first, count));
    }

    /// ([(is_stored, key)], whether some were lost) since the last call.
    fn events<'py>(&self, py: Python<'py>, limit: usize) -> (Vec<(bool, Bound<'py, PyBytes>)>, bool) {
        let found = self.call(py, Events::default(), |instance| instance.events(limit));
        let told = |event: &Event| match event {
            Event::Stored(key) => (true, PyBytes::new(py, &to_bytes(&[*key]))),
            Event::Removed(key) => (false, PyBytes::new(py, &to_bytes(&[*key]))),
        };
        (found.events.iter().map(told).collect(), found.lost)
    }

    /// Forgets every block of the server; how many.
    fn reset(&self, py: Python<'_>) -> PyResult<u64> {
        // Not under the lock: a match must not wait for the SSD.
        let socket = self.call(py, None, |instance| Some(instance.socket().clone()));
        let socket = socket.ok_or_else(|| PyConnectionError::new_err("this instance is closed"))?;
        py.detach(|| instance::reset(&socket)).map_err(PyConnectionError::new_err)
    }

    #[getter]
    fn is_connected(&self, py: Python<'_>) -> bool {
        self.call(py, false, |instance| instance.session().is_some())
    }

    /// Why there is no server, or which settings the one there does not have.
    #[getter]
    fn trouble(&self, py: Python<'_>) -> Vec<String> {
        self.call(py, Vec::new(), |instance| match instance.session() {
            Some(_) => instance.unheeded().to_vec(),
            None => instance.refusal().or(instance.trouble()).map(str::to_owned).into_iter().collect(),
        })
    }

    #[getter]
    fn sessions_count(&self, py: Python<'_>) -> u32 {
        self.call(py, 0, |instance| instance.sessions_count())
    }

    /// Why the server refused to take this instance back, or None.
    #[getter]
    fn refusal(&self, py: Python<'_>) -> Option<String> {
        self.call(py, None, |instance| instance.refusal().map(str::to_owned))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(lock(&self.0).take()));
    }
}

/// What an engine's worker holds: a thread that copies between the pool and KV tensors.
#[pyclass(frozen, module = "kvring")]
struct Agent {
    // Before the tensors: fields are dropped in this order, and the thread ends with the agent.
    agent: Arc<agent::Agent>,
    is_closed: AtomicBool,
    tensors: Mutex<Vec<Py<PyAny>>>,
}

impl Agent {
    fn get(&self) -> PyResult<&agent::Agent> {
        match self.is_closed.load(Ordering::Acquire) {
            true => Err(PyRuntimeError::new_err("this agent is closed")),
            false => Ok(&self.agent),
        }
    }

    /// The moment that a ticket has to wait for: what was submitted to the engine's stream so far.
    fn moment(&self, stream: Option<u64>) -> PyResult<Option<kvring_gpu::backend::Moment>> {
        match stream {
            Some(stream) => self.agent.mark(stream).map_err(PyRuntimeError::new_err),
            None => Ok(None),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let drained = Python::attach(|py| py.detach(|| self.agent.stop()));
        if !drained {
            std::mem::take(&mut *lock(&self.tensors)).into_iter().for_each(std::mem::forget);
        }
    }
}

/// A ticket's state, without a lock and without waiting.
#[pyclass(frozen, module = "kvring")]
struct Watch(agent::Watch);

#[pymethods]
impl Watch {
    #[getter]
    fn is_ended(&self) -> bool {
        self.0.is_ended()
    }
    /// It has ended, and not every block came.
    #[getter]
    fn has_missed(&self) -> bool {
        self.0.has_missed()
    }
    /// Groups of layers of which every block has come.
    #[getter]
    fn groups_done(&self) -> u32 {
        self.0.groups_done()
    }
}

/// (ticket, is_load, indices of blocks that did not come, seconds)
type Ended = (u64, bool, Vec<u32>, f64);

#[pymethods]
impl Agent {
    /// `tensors` are those that `memory` describes: kept alive as long as this agent is.
    #[new]
    #[pyo3(signature = (settings, layout, memory, tensors, rank=0, token=None, load_timeout_ms=2000, store_timeout_ms=2000, device=None, copy_way=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, in Python")]
    fn new(
        py: Python<'_>,
        settings: Vec<(String, String)>,
        layout: &str,
        memory: &str,
        tensors: Vec<Py<PyAny>>,
        rank: u32,
        token: Option<String>,
        load_timeout_ms: u64,
        store_timeout_ms: u64,
        device: Option<i32>,
        copy_way: Option<&str>,
    ) -> PyResult<Self> {
        let unknown =
            |way| PyValueError::new_err(format!("copy_way = {way:?}: engine, staged or direct, or none of them"));
        let calibration = copy_way.map(|way| Calibration::of_way(way).ok_or_else(|| unknown(way))).transpose()?;
        let map: MemoryMap =
            serde_json::from_str(memory).map_err(|error| PyValueError::new_err(format!("memory: {error}")))?;
        let parsed: Layout =
            serde_json::from_str(layout).map_err(|error| PyValueError::new_err(format!("layout: {error}")))?;
        let over = py.detach(|| over_tensors(&map)).map_err(PyValueError::new_err)?;
        let slot_end = over.placement().slot_end();
        if slot_end as u64 > parsed.block_bytes {
            return Err(PyValueError::new_err(format!(
                "block_bytes = {}: this rank's part of a slot ends at {slot_end}",
                parsed.block_bytes
            )));
        }
        let config = config_of(settings.clone())?;
        let over_device = match device {
            Some(device) => {
                let options = CudaOptions {
                    device,
                    driver: config.cuda_driver,
                    staging_bytes: config.cuda_staging_bytes as usize,
                    may_batch: config.cuda_batch_copy,
                    calibration,
                    ..CudaOptions::default()
                };
                let tensors = over.clone();
                // Before the server is asked: without a device there is nothing to ask for.
                let made = py.detach(|| CudaBackend::new(tensors, options));
                Some(made.map_err(|error| PyOSError::new_err(error.to_string()))?)
            }
            None => None,
        };
        let instance = open(py, Some(layout), settings, rank, token)?;
        let patience = agent::Patience {
            load: Duration::from_millis(load_timeout_ms),
            store: Duration::from_millis(store_timeout_ms),
            ..agent::Patience::default()
        };
        let agent = match over_device {
            Some(backend) => agent::Agent::start(instance, backend, patience)?,
            None => {
                let backend = HostBackend::with_threads(HostTensors::new(over), config.copy_threads)?;
                agent::Agent::start(instance, backend, patience)?
            }
        };
        Ok(Self { agent: Arc::new(agent), is_closed: AtomicBool::new(false), tensors: Mutex::new(tensors) })
    }

    /// Submits a load; never waits.
    #[pyo3(signature = (ticket, lease_id, expires_at_ns, first, keys, pages, epoch=None, stream=None, layer_groups=1))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, in Python")]
    fn load(
        &self,
        ticket: u64,
        lease_id: u64,
        expires_at_ns: u64,
        first: u32,
        keys: &[u8],
        pages: Vec<u32>,
        epoch: Option<u64>,
        stream: Option<u64>,
        layer_groups: u32,
    ) -> PyResult<Watch> {
        let (agent, keys) = (self.get()?, keys_of(keys)?);
        let epoch = epoch.unwrap_or_else(|| agent.epoch());
        let (lease, after) = (LeaseId(lease_id), self.moment(stream)?);
        let load = agent::Load { ticket, lease, expires_at_ns, first, keys, pages, epoch, after, layer_groups };
        agent.load(load).map(Watch).map_err(|refused| PyValueError::new_err(refused.to_string()))
    }

    /// Submits a store; never waits. `parent` is empty for a chain's first block.
    #[pyo3(signature = (ticket, parent, first, keys, pages, epoch=None, stream=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, in Python")]
    fn store(
        &self,
        ticket: u64,
        parent: &[u8],
        first: u32,
        keys: &[u8],
        pages: Vec<u32>,
        epoch: Option<u64>,
        stream: Option<u64>,
    ) -> PyResult<Watch> {
        let (agent, keys) = (self.get()?, keys_of(keys)?);
        let epoch = epoch.unwrap_or_else(|| agent.epoch());
        let parent = if parent.is_empty() { BlockKey::default() } else { one_key(parent)? };
        let after = self.moment(stream)?;
        let store = agent::Store { ticket, parent, first, keys, pages, epoch, after };
        agent.store(store).map(Watch).map_err(|refused| PyValueError::new_err(refused.to_string()))
    }

    /// Makes these tickets end soon; does not wait.
    fn cancel(&self, tickets: Vec<u64>) -> PyResult<()> {
        self.get()?.cancel(&tickets);
        Ok(())
    }

    /// Which epoch the memory is in.
    #[getter]
    fn epoch(&self) -> u64 {
        self.agent.epoch()
    }

    /// Before the tensors go: ends every ticket and lets go of them. False: copies are still in flight.
    fn suspend(&self, py: Python<'_>, patience_ms: u64) -> PyResult<bool> {
        let agent = self.get()?;
        let gone = py.detach(|| agent.suspend(Duration::from_millis(patience_ms)));
        if gone {
            let gone = std::mem::take(&mut *lock(&self.tensors));
            drop(gone);
        }
        Ok(gone)
    }

    /// After they have come back; says the new epoch.
    fn resume(&self, py: Python<'_>, memory: &str, tensors: Vec<Py<PyAny>>) -> PyResult<u64> {
        let agent = self.get()?;
        let map: MemoryMap =
            serde_json::from_str(memory).map_err(|error| PyValueError::new_err(format!("memory: {error}")))?;
        let resumed = py.detach(|| agent.resume(over_tensors(&map)?));
        match resumed {
            Ok(epoch) => {
                let before = std::mem::replace(&mut *lock(&self.tensors), tensors);
                drop(before);
                Ok(epoch)
            }
            Err(error) => {
                // Whether it has taken them nobody can tell where it is stuck: they are kept with the others.
                lock(&self.tensors).extend(tensors);
                Err(PyRuntimeError::new_err(error))
            }
        }
    }

    /// Tickets that have ended since the last call.
    fn poll(&self) -> PyResult<Vec<Ended>> {
        let ended = self.agent.poll();
        Ok(ended.into_iter().map(|f| (f.ticket, f.is_load, f.missed, f.took.as_secs_f64())).collect())
    }

    /// Waits until a ticket has ended; True if `poll` has something.
    fn wait(&self, py: Python<'_>, at_most_ms: u64) -> PyResult<bool> {
        let agent = self.get()?;
        Ok(py.detach(|| agent.wait(Duration::from_millis(at_most_ms))))
    }

    /// Waits until these stores read no page any more; stops those that are not done after `patience_ms`.
    fn fence(&self, py: Python<'_>, tickets: Vec<u64>, patience_ms: u64) -> PyResult<bool> {
        let agent = self.get()?;
        Ok(py.detach(|| agent.fence(&tickets, Duration::from_millis(patience_ms))))
    }

    /// Why there is no server, or which settings the one there does not have.
    #[getter]
    fn trouble(&self) -> Vec<String> {
        self.agent.trouble()
    }

    #[getter]
    fn is_connected(&self) -> bool {
        self.agent.is_connected()
    }

    /// Counters since it was started, by name.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in self.agent.counters().read() {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }

    /// Ends every ticket and the thread. True: the tensors are not touched after this. `poll` still tells
    /// how they ended.
    fn close(&self, py: Python<'_>) -> bool {
        self.is_closed.store(true, Ordering::Release);
        let drained = py.detach(|| self.agent.stop());
        if !drained {
            // Copies may be in flight: tensors that are freed now would be somebody else's memory.
            std::mem::take(&mut *lock(&self.tensors)).into_iter().for_each(std::mem::forget);
        }
        drained
    }
}

#[expect(unsafe_code, reason = "an address that Python gives is Python's promise")]
fn over_tensors(map: &MemoryMap) -> Result<Tensors, String> {
    // SAFETY: `Agent` holds the tensors until its thread has ended or let go of them (`close`, `suspend`, the order of its fields), and an inference engine leaves pages alone while they are loaded or stored.
    unsafe { Tensors::new(map) }
}

/// The key that a chain's first block has as its parent: (tag, text) parts; tags as in docs/WIRE.md §7.
#[pyfunction]
fn namespace_root<'py>(py: Python<'py>, parts: Vec<(String, String)>) -> PyResult<Bound<'py, PyBytes>> {
    let mut namespace = key::Namespace::default();
    for (tag, text) in &parts {
        namespace = match tag.as_str() {
            "model" => namespace.model(text),
            "lora" => namespace.lora(text),
            "cache_salt" => namespace.cache_salt(text),
            "tenant" => namespace.tenant(text),
            _ => return Err(PyValueError::new_err(format!("{tag}: model, lora, cache_salt or tenant is expected"))),
        };
    }
    Ok(PyBytes::new(py, &to_bytes(&[namespace.root()])))
}

/// What a store of a chain's first block names as its parent, of the chain's root.
#[pyfunction]
fn namespace_id<'py>(py: Python<'py>, root: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &to_bytes(&[key::id_of_root(one_key(root)?)])))
}

/// Keys of the full blocks of `tokens` after `parent`. `extras`: for a block's index, what else its
/// bytes depend on.
#[pyfunction]
#[pyo3(signature = (parent, tokens, tokens_per_block, extras=None))]
fn next_keys<'py>(
    py: Python<'py>,
    parent: &[u8],
    tokens: Vec<u32>,
    tokens_per_block: usize,
    extras: Option<std::collections::HashMap<usize, Vec<Vec<u8>>>>,
) -> PyResult<Bound<'py, PyBytes>> {
    if tokens_per_block == 0 {
        return Err(PyValueError::new_err("tokens_per_block = 0: at least 1 is expected"));
    }
    let mut parent = one_key(parent)?;
    let extras = extras.unwrap_or_default();
    let keys: Vec<_> = tokens
        .chunks_exact(tokens_per_block)
        .enumerate()
        .map(|(index, block)| {
            let extra: Vec<&[u8]> = extras.get(&index).map_or(Vec::new(), |e| e.iter().map(Vec::as_slice).collect());
            parent = key::next_key(parent, block, &extra);
            parent
        })
        .collect();
    Ok(PyBytes::new(py, &to_bytes(&keys)))
}

/// Everything an operator said, by flags, file and environment: {setting: value}, and notes on
/// FlexKV settings that do not apply.
#[pyfunction]
fn load_config(settings: Vec<(String, String)>) -> PyResult<(std::collections::BTreeMap<String, String>, Vec<String>)> {
    let loaded = load(&settings)?;
    let mut said: std::collections::BTreeMap<String, String> =
        loaded.config.said.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    said.insert("server_recv_port".into(), loaded.config.socket.display().to_string());
    Ok((said, loaded.notes))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("KEY_CONTRACT_VERSION", key::KEY_CONTRACT_VERSION)?;
    module.add_class::<Lease>()?;
    module.add_class::<Instance>()?;
    module.add_class::<Agent>()?;
    module.add_class::<Watch>()?;
    module.add_function(wrap_pyfunction!(namespace_root, module)?)?;
    module.add_function(wrap_pyfunction!(namespace_id, module)?)?;
    module.add_function(wrap_pyfunction!(next_keys, module)?)?;
    module.add_function(wrap_pyfunction!(load_config, module)?)?;
    Ok(())
}

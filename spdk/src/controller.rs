//! Controllers, found by their address: one for the whole process, however often it is asked for.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use crate::api::{Api, NamespaceInfo, RawController};
use crate::{SpdkError, checked, env};

/// A namespace, as its controller describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its number.
    pub nsid: u32,
    /// Its size.
    pub bytes: u64,
    /// Bytes of a logical block.
    pub sector_bytes: u32,
    /// Bytes of metadata with each.
    pub metadata_bytes: u32,
    /// Bytes that one command may move; the driver splits what is larger.
    pub transfer_bytes_max: u32,
    /// The controller's serial number.
    pub serial: String,
    /// Its model.
    pub model: String,
    /// Its firmware.
    pub firmware: String,
}

/// A controller with one of its namespaces.
pub struct Controller {
    pub(crate) api: &'static Api,
    raw: Raw,
    address: String,
    namespace: Namespace,
    /// Who waits for administrative commands: the keeper of the connection, or who asks for the health.
    admin: Arc<Mutex<()>>,
    stop: Arc<AtomicBool>,
    failed: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
pub(crate) struct Raw(pub *mut RawController);
// SAFETY: SPDK locks a controller itself; its administrative queue is polled under `admin`.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// How often the connection is kept alive, and what is over is looked for.
const ADMIN_PAUSE: Duration = Duration::from_millis(100);

/// How long a controller may take to be let go of: two seconds.
const DETACH_TRIES: u32 = 400;
const DETACH_PAUSE: Duration = Duration::from_millis(5);

static CONTROLLERS: Mutex<Option<HashMap<String, Weak<Controller>>>> = Mutex::new(None);

impl Controller {
    /// The controller and namespace at an address: SPDK's transport id ("trtype:TCP adrfam:IPv4 traddr:127.0.0.1
    /// trsvcid:4420 subnqn:..."), and `ns:N` for another namespace than the first. Waits until it is connected.
    ///
    /// # Errors
    /// [`SpdkError`].
    pub fn open(address: &str) -> Result<Arc<Self>, SpdkError> {
        let mut controllers = CONTROLLERS.lock().unwrap_or_else(PoisonError::into_inner);
        let controllers = controllers.get_or_insert_default();
        let key = normalised(address);
        if let Some(controller) = controllers.get(&key).and_then(Weak::upgrade) {
            // SPDK would hand out the failed one again as long as anybody has it.
            return match controller.has_failed() {
                false => Ok(controller),
                true => Err(SpdkError::Connect { address: address.into(), errno: Errno::NOTCONN }),
            };
        }
        let controller = Arc::new(Self::connect(address)?);
        controllers.insert(key, Arc::downgrade(&controller));
        Ok(controller)
    }

    fn connect(address: &str) -> Result<Self, SpdkError> {
        let api = env::env()?;
        let mut nsid = 0;
        let mut words = Vec::new();
        for word in address.split_whitespace() {
            match word.strip_prefix("ns:") {
                Some(number) => {
                    let why = "ns: takes the number of a namespace";
                    nsid = number.parse().map_err(|_| SpdkError::Address { address: address.into(), why })?;
                }
                None => words.push(word),
            }
        }
        let why = "an address has no zero in it";
        let id = CString::new(words.join(" ")).map_err(|_| SpdkError::Address { address: address.into(), why })?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the id is read, and the controller's place written, before it returns.
        let connected = checked(unsafe { (api.connect)(id.as_ptr(), &raw mut raw) });
        connected.map_err(|errno| SpdkError::Connect { address: address.into(), errno })?;
        let namespace = namespace_of(api, raw, nsid);
        let namespace = namespace.map_err(|errno| {
            // SAFETY: nothing else uses it.
            unsafe { (api.detach)(raw) };
            SpdkError::Namespace { address: address.into(), nsid, errno }
        })?;
        let mut controller = Self {
            api,
            raw: Raw(raw),
            address: address.to_owned(),
            namespace,
            admin: Arc::default(),
            stop: Arc::default(),
            failed: Arc::default(),
            keeper: None,
        };
        controller.keep_alive()?;
        Ok(controller)
    }

    fn keep_alive(&mut self) -> Result<(), SpdkError> {
        let (api, raw, admin) = (self.api, self.raw, self.admin.clone());
        let (stop, failed) = (self.stop.clone(), self.failed.clone());
        let keep = move || {
            let raw = raw;
            while !stop.load(Ordering::Relaxed) {
                {
                    let _alone = admin.lock().unwrap_or_else(PoisonError::into_inner);
                    // SAFETY: the controller is detached only after this thread has ended.
                    if unsafe { (api.poll_admin)(raw.0) } < 0 {
                        failed.store(true, Ordering::Relaxed);
                    }
                }
                std::thread::park_timeout(ADMIN_PAUSE);
            }
        };
        let keeper = std::thread::Builder::new().name("kvring-spdk".into()).spawn(keep);
        let failed = |error: std::io::Error| SpdkError::Io {
            address: self.address.clone(),
            what: "start a thread",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
        };
        self.keeper = Some(keeper.map_err(failed)?);
        Ok(())
    }

    pub(crate) fn raw(&self) -> *mut RawController {
        self.raw.0
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }
    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
    /// Whether the controller has failed: it is to be connected anew.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
    /// Of which SPDK this is.
    pub fn version(&self) -> String {
        self.api.version()
    }

    /// Its health log: 512 bytes (NVM Express Base Specification 2.0, clause 5.16.1.3).
    ///
    /// # Errors
    /// It does not say.
    pub fn health(&self) -> Result<[u8; 512], SpdkError> {
        let mut page = [0; 512];
        let _alone = self.admin.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the page is written before it returns; nobody else polls for administrative commands.
        let said = checked(unsafe { (self.api.health)(self.raw.0, page.as_mut_ptr().cast()) });
        said.map_err(|errno| SpdkError::Io { address: self.address.clone(), what: "health log", errno })?;
        Ok(page)
    }
}

/// One spelling of an address: its words in order, in small letters where case says nothing.
pub fn normalised(address: &str) -> String {
    let lower = |word: &str| match word.split_once(':') {
        Some((name, value)) if name.eq_ignore_ascii_case("subnqn") => format!("subnqn:{value}"),
        _ => word.to_ascii_lowercase(),
    };
    let mut words: Vec<String> = address.split_whitespace().map(lower).collect();
    words.sort_unstable();
    words.join(" ")
}

fn namespace_of(api: &Api, raw: *mut RawController, nsid: u32) -> Result<Namespace, Errno> {
    let mut info = NamespaceInfo {
        bytes: 0,
        sector_bytes: 0,
        metadata_bytes: 0,
        transfer_bytes_max: 0,
        nsid: 0,
        serial: [0; 24],
        model: [0; 44],
        firmware: [0; 12],
    };
    // SAFETY: the controller is connected, and the struct is written before it returns.
    checked(unsafe { (api.namespace)(raw, nsid, &raw mut info) })?;
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).trim().to_owned()
    };
    Ok(Namespace {
        nsid: info.nsid,
        bytes: info.bytes,
        sector_bytes: info.sector_bytes,
        metadata_bytes: info.metadata_bytes,
        transfer_bytes_max: info.transfer_bytes_max,
        serial: text(&info.serial),
        model: text(&info.model),
        firmware: text(&info.firmware),
    })
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.keeper.take() {
            keeper.thread().unpark();
            let _ = keeper.join();
        }
        // A target that answers nothing is not waited for: the process ends without it.
        let (api, raw) = (self.api, self.raw);
        let detached = Arc::new(AtomicBool::new(false));
        let told = detached.clone();
        let detach = move || {
            let raw = raw;
            // SAFETY: every pair of queues held this controller, so there is none; the keeper has ended.
            unsafe { (api.detach)(raw.0) };
            told.store(true, Ordering::Relaxed);
        };
        if std::thread::Builder::new().spawn(detach).is_err() {
            return;
        }
        for _ in 0..DETACH_TRIES {
            if detached.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(DETACH_PAUSE);
        }
    }
}

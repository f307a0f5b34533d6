//! The control socket: one JSON message a datagram over a unix SEQPACKET socket, descriptors beside
//! it (WIRE.md §1). Slow, readable, and done before the first block moves.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::layout::{Difference, Layout};

/// Largest message: a layout and its differences are well under 4 KiB.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most descriptors in one message.
const FDS_MAX: usize = 8;

/// What a client asks on the control socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Open a session.
    Attach(Attach),
    /// The session is drained: its slots may be used again at once.
    Goodbye,
    /// Nothing of this process writes into slots any more that a session of an engine process gave it
    /// that is gone. Not answered.
    Drained {
        /// That session.
        session: u32,
    },
    /// Counters, as JSON.
    Stats,
    /// The stats segment, to read (WIRE.md §10).
    StatsSegment,
    /// Forget every block, on the SSD too.
    Reset,
    /// Forget the blocks of a namespace, on the SSD too.
    ResetNamespace {
        /// Its id: 32 hexadecimal digits; zeros for blocks that name none.
        namespace: String,
    },
    /// The namespaces that are known, from this number on.
    Namespaces {
        /// Where to go on: 0, or what the last answer said.
        from: u32,
    },
    /// Stop the server: sessions are closed, writes in flight finish.
    Stop,
    /// Read what the cache holds and compare it with its checksums; `Stats` says how it goes.
    Verify {
        /// Bound on what is read; 0 for none.
        bytes_per_s: u64,
    },
    /// Blocks that are known, from this place of the index on; or what is known of one.
    Blocks {
        /// Where to go on: 0, or what the last answer said.
        from: u32,
        /// Only the block with this key: 32 hexadecimal digits.
        #[serde(default)]
        key: Option<String>,
    },
    /// Have up to so many blocks leave a tier, those that the policy would take next.
    Evict {
        /// dram or ssd.
        tier: String,
        /// How many.
        blocks: u32,
    },
    /// Forget a block, and all that continues it, on the SSD too.
    Forget {
        /// Its key: 32 hexadecimal digits.
        key: String,
    },
    /// Take no stores and write what is dirty; or take them again.
    Drain {
        /// Whether to drain.
        on: bool,
    },
    /// Replace the engine process by what the program file is now; the pool stays.
    Upgrade,
    /// Give the tiers other sizes. Done by another engine process, as an upgrade is.
    Resize(Sizes),
}

/// Sizes of tiers that somebody has asked for while the server runs. `None`: as it was started with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Bytes of the pool.
    #[serde(default)]
    pub cpu_cache_bytes: Option<u64>,
    /// Bytes of the SSD tier.
    #[serde(default)]
    pub ssd_cache_bytes: Option<u64>,
}

impl Sizes {
    /// These, and where these say nothing, those.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            cpu_cache_bytes: self.cpu_cache_bytes.or(others.cpu_cache_bytes),
            ssd_cache_bytes: self.ssd_cache_bytes.or(others.ssd_cache_bytes),
        }
    }
}

/// Who wants a session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    /// [`crate::wire::PROTOCOL_VERSION`] of the client.
    pub protocol: u32,
    /// FLEXKV_INSTANCE_ID.
    pub instance_id: u32,
    /// Random, shared by the processes of one instance and nobody else: leases belong to it.
    pub instance_token: String,
    /// Tensor-parallel rank, or 0 for a scheduler.
    pub rank: u32,
    /// What this instance's blocks look like. None: this session moves no block, it only matches, as an
    /// engine's scheduler does; its keys' namespace says which blocks they can mean.
    pub layout: Option<Layout>,
}

/// What the server answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// A session: segment, pool and the client's end of the bell come beside it.
    Welcome(Welcome),
    /// No session, and why.
    Refused {
        /// A sentence for the operator.
        reason: String,
        /// Every field in which the layouts differ, if that is why.
        differences: Vec<Difference>,
        /// Whether asking again is in vain.
        permanent: bool,
    },
    /// Answer to `Stats`.
    Stats(serde_json::Value),
    /// Answer to `StatsSegment`: its descriptor comes beside it.
    StatsSegment,
    /// Answer to `Reset`, `ResetNamespace` and `Forget`.
    Reset {
        /// How many blocks were forgotten.
        blocks: u64,
        /// Whether a restart will not find them again either.
        durable: bool,
    },
    /// Answer to `Stop`.
    Stopping,
    /// Answer to `Verify`.
    Verifying,
    /// Answer to `Upgrade` and `Resize`: it is being prepared.
    Upgrading {
        /// By which engine process: it may be another one than was asked for its state before. 0: an earlier version,
        /// which does not say.
        #[serde(default)]
        epoch: u64,
        /// How many have failed before.
        #[serde(default)]
        upgrades_failed: u64,
    },
    /// Answer to `Blocks`, `Evict` and `Drain`.
    Admin(serde_json::Value),
}

/// What a client must know of the pool.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// Names this session in logs and statistics.
    pub session: u32,
    /// Bytes of the pool's memfd.
    pub pool_bytes: u64,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Slots in the pool.
    pub slots_count: u32,
    /// Bytes of the pages behind it.
    pub page_bytes: u64,
    /// Names the pool as it is now: under the same name it lies where it lay. Another size has another name.
    pub pool_id: u64,
    /// Names the pool whatever its size: slots of the same number are the same memory. 0, of a server that does not
    /// say: as `pool_id`.
    #[serde(default)]
    pub memory_id: u64,
    /// Which engine process this is: what it grants is void when the epoch moves on.
    pub epoch: u64,
    /// The server's engine process.
    pub server_pid: u32,
    /// What the server was started with: every setting by name, as text.
    pub settings: std::collections::BTreeMap<String, String>,
}

impl Welcome {
    /// Names the memory that slots lie in.
    pub fn memory(&self) -> u64 {
        if self.memory_id == 0 { self.pool_id } else { self.memory_id }
    }
}

/// A connected control socket.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side has closed the socket.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("no answer in time")]
    TimedOut,
    /// Not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
    /// The kernel refused.
    #[error("{0}")]
    System(#[from] Errno),
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    socket_of(SocketType::SEQPACKET)
}

fn socket_of(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

/// Binds a path. Mode 0600; for members of one group 0660, for those of several 0666: who they are is asked
/// of each who connects. Nobody can before [`listen`].
///
/// # Errors
/// What the kernel says: `EADDRINUSE` if the path exists.
pub fn bind(path: &Path, groups: &[u32]) -> rustix::io::Result<OwnedFd> {
    bind_of(SocketType::SEQPACKET, path, groups)
}

/// As [`bind`], for what is no control socket: a stream.
///
/// # Errors
/// As [`bind`].
pub fn bind_stream(path: &Path, groups: &[u32]) -> rustix::io::Result<OwnedFd> {
    bind_of(SocketType::STREAM, path, groups)
}

fn bind_of(kind: SocketType, path: &Path, groups: &[u32]) -> rustix::io::Result<OwnedFd> {
    let fd = socket_of(kind)?;
    let address = SocketAddrUnix::new(path)?;
    // Nobody can connect before listen, so the mode is right before it matters.
    rustix::net::bind(&fd, &address)?;
    let mode = match groups {
        [] => 0o600,
        [group] => {
            rustix::fs::chown(path, None, Some(rustix::fs::Gid::from_raw(*group)))?;
            0o660
        }
        _ => 0o666,
    };
    rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(mode))?;
    Ok(fd)
}

/// Listens on a bound socket. Again on one that listens: nothing changes.
///
/// # Errors
/// What the kernel says.
pub fn listen(socket: impl AsFd) -> rustix::io::Result<()> {
    rustix::net::listen(socket, 128)
}

impl Channel {
    /// Connects to a server. Every later wait on this channel is bounded by `timeout`.
    ///
    /// # Errors
    /// What the kernel says: `ENOENT` and `ECONNREFUSED` mean that no server listens there.
    pub fn connect(path: &Path, timeout: Duration) -> rustix::io::Result<Self> {
        let fd = socket()?;
        let channel = Self { fd };
        // Before connect: a stopped server's full backlog must not block us either.
        channel.bound(timeout)?;
        let address = SocketAddrUnix::new(path)?;
        rustix::io::retry_on_intr(|| rustix::net::connect(&channel.fd, &address))?;
        Ok(channel)
    }

    /// Two ends, for a process and its child.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pair() -> rustix::io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { fd: ours }, theirs))
    }

    /// A connection that was accepted.
    pub fn accepted(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Every later wait on this channel is bounded by `timeout`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bound(&self, timeout: Duration) -> rustix::io::Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&self.fd, Timeout::Recv, Some(timeout))?;
        set_socket_timeout(&self.fd, Timeout::Send, Some(timeout))
    }

    /// Sends one message with descriptors.
    ///
    /// # Errors
    /// [`ChannelError`]; nothing was sent.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let text = serde_json::to_vec(message).map_err(|error| ChannelError::Malformed(error.to_string()))?;
        if text.len() > MESSAGE_BYTES_MAX {
            return Err(ChannelError::Malformed(format!("{} bytes are too long", text.len())));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.fd, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)
        });
        match sent {
            Ok(_) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(ChannelError::Closed),
            Err(Errno::AGAIN) => Err(ChannelError::TimedOut),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Receives one message and its descriptors. `wait` false: [`ChannelError::TimedOut`] if none is there.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn receive<T: DeserializeOwned>(&self, wait: bool) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut text = vec![0; MESSAGE_BYTES_MAX + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        // A wait with a bound is not restarted by the kernel when it is interrupted (signal(7)).
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(&self.fd, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags)
        });
        let bytes = match received {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN) => return Err(ChannelError::TimedOut),
            Err(Errno::CONNRESET | Errno::PIPE) => return Err(ChannelError::Closed),
            Err(errno) => return Err(errno.into()),
        };
        // Collected first: descriptors of a message that is then refused are closed, not leaked.
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if bytes == 0 {
            return Err(ChannelError::Closed);
        }
        Ok((parse(&text[..bytes])?, fds))
    }
}

/// The message that a datagram holds.
///
/// # Errors
/// [`ChannelError::Malformed`].
pub fn parse<T: DeserializeOwned>(datagram: &[u8]) -> Result<T, ChannelError> {
    if datagram.len() > MESSAGE_BYTES_MAX {
        return Err(ChannelError::Malformed(format!("longer than {MESSAGE_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(datagram).map_err(|error| ChannelError::Malformed(error.to_string()))
}

/// Asks a server one thing that opens no session.
///
/// # Errors
/// [`ChannelError`]; `ENOENT` or `ECONNREFUSED` mean that no server listens there.
pub fn ask(path: &Path, request: &Request, timeout: Duration) -> Result<Reply, ChannelError> {
    Ok(ask_for_fds(path, request, timeout)?.0)
}

/// As [`ask`], with the descriptors that come beside the answer.
///
/// # Errors
/// As [`ask`].
pub fn ask_for_fds(path: &Path, request: &Request, timeout: Duration) -> Result<(Reply, Vec<OwnedFd>), ChannelError> {
    let channel = Channel::connect(path, timeout)?;
    channel.send(request, &[])?;
    channel.receive(true)
}

#[cfg(test)]
mod test {
    use super::*;

    /// The messages as they travel: whoever changes one changes the protocol.
    #[test]
    fn the_golden_messages() {
        let attach = Request::Attach(Attach {
            protocol: 1,
            instance_id: 2,
            instance_token: "t".into(),
            rank: 3,
            layout: Some(Layout::opaque(4096)),
        });
        let text = serde_json::to_string(&attach).unwrap();
        assert_eq!(
            text,
            r#"{"request":"attach","protocol":1,"instance_id":2,"instance_token":"t","rank":3,"layout":{"model":"opaque","dtype":"u8","tokens_per_block":1,"layers":1,"kv_heads":1,"head_size":1,"tp_size":1,"pp_size":1,"kv_layout":"block_first","block_bytes":4096,"key_contract":1}}"#
        );
        assert_eq!(serde_json::to_string(&Request::Goodbye).unwrap(), r#"{"request":"goodbye"}"#);
        let refused = Reply::Refused { reason: "no".into(), differences: vec![], permanent: true };
        assert_eq!(
            serde_json::to_string(&refused).unwrap(),
            r#"{"reply":"refused","reason":"no","differences":[],"permanent":true}"#
        );
    }

    #[test]
    fn a_message_and_its_descriptors_arrive_and_garbage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = bind(&path, &[]).unwrap();
        assert!(Channel::connect(&path, Duration::from_millis(200)).is_err(), "nobody listens yet");
        listen(&listener).unwrap();
        let client = Channel::connect(&path, Duration::from_millis(200)).unwrap();
        let server = Channel::accepted(rustix::net::accept(&listener).unwrap());
        client.send(&Request::Stats, &[listener.as_fd()]).unwrap();
        let (request, fds): (Request, _) = server.receive(true).unwrap();
        assert!(matches!(request, Request::Stats) && fds.len() == 1);
        server.send(&serde_json::json!({"reply": "nonsense"}), &[]).unwrap();
        assert!(matches!(client.receive::<Reply>(true), Err(ChannelError::Malformed(_))));
        assert!(matches!(client.receive::<Reply>(true), Err(ChannelError::TimedOut)));
        drop(server);
        assert!(matches!(client.receive::<Reply>(true), Err(ChannelError::Closed)));
    }
}

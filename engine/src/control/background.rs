//! Work that may wait.

/// From now on the calling thread runs where nobody else wants a core, and leaves it at once to whoever does (sched(7),
/// `SCHED_IDLE`). At an equal priority a thread that works in the kernel is left its slice, which a request then waits for:
/// two ticks of 4 ms with a kernel of 250 Hz. There is no way back for a user without privileges.
pub fn yield_to_others() {
    // SAFETY: plain data, read by the call.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: of this thread alone (0). A refusal changes nothing.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
}

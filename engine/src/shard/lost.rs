//! A device that fails again and again, or answers nothing for long, is lost: its blocks are forgotten and nothing more is
//! asked of it, so that it costs its blocks and nothing else. Now and then one write tries whether it is back.

/// Failures in a row after which a device is lost.
pub const ERRORS_IN_A_ROW: u32 = 16;
/// A device that ends nothing for so long answers nothing.
const SILENT_NS: u64 = 10_000_000_000;
/// A transfer that takes so long, whatever else ends, is one that nobody waits for any more. The kernel gives an NVMe
/// command up after 30 s.
const STUCK_NS: u64 = 35_000_000_000;
/// The first pause before a lost device is tried again; each next one is twice as long.
const PAUSE_NS: u64 = 5_000_000_000;
const PAUSE_NS_MAX: u64 = 300_000_000_000;
/// Slots whose blocks are forgotten in one round.
pub const FORGOTTEN_A_ROUND: u32 = 64;

/// What is known of a device's health.
#[derive(Debug, Clone, Copy, Default)]
pub struct Health {
    errors_in_a_row: u32,
    lost: Option<Lost>,
    /// When a transfer ended the last time.
    ended_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Lost {
    next_try_ns: u64,
    pause_ns: u64,
    /// One write may be sent to it.
    tries: bool,
    /// Of its own slots, the first whose block is not forgotten yet.
    forget_from: u32,
}

/// What a transfer's end says of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing new.
    None,
    /// It is lost.
    Lost,
    /// It is there again.
    Back,
}

impl Health {
    /// Whether it is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }
    /// Whether a write may try it.
    pub fn tries(&self) -> bool {
        self.lost.is_some_and(|lost| lost.tries)
    }

    /// Whether nobody should wait for it any more, of whose transfers the oldest has been in flight since `oldest_ns`.
    pub fn is_stalled(&self, oldest_ns: u64, now_ns: u64) -> bool {
        let silent = now_ns.saturating_sub(oldest_ns.max(self.ended_ns)) > SILENT_NS;
        self.lost.is_none() && (silent || now_ns.saturating_sub(oldest_ns) > STUCK_NS)
    }

    /// A transfer has ended.
    pub fn ended(&mut self, good: bool, now_ns: u64) -> Turn {
        self.ended_ns = now_ns;
        if good {
            self.errors_in_a_row = 0;
            return if self.lost.take().is_some() { Turn::Back } else { Turn::None };
        }
        self.errors_in_a_row = self.errors_in_a_row.saturating_add(1);
        if let Some(lost) = &mut self.lost {
            if std::mem::take(&mut lost.tries) {
                lost.pause_ns = (2 * lost.pause_ns).min(PAUSE_NS_MAX);
            }
            lost.next_try_ns = now_ns.saturating_add(lost.pause_ns);
            return Turn::None;
        }
        if self.errors_in_a_row < ERRORS_IN_A_ROW {
            return Turn::None;
        }
        self.lose(now_ns);
        Turn::Lost
    }

    /// It is lost from now on.
    pub fn lose(&mut self, now_ns: u64) {
        let next_try_ns = now_ns.saturating_add(PAUSE_NS);
        self.lost = Some(Lost { next_try_ns, pause_ns: PAUSE_NS, tries: false, forget_from: 0 });
    }

    /// Whether the time to try it has come: said once.
    pub fn may_try(&mut self, now_ns: u64) -> bool {
        let Some(lost) = self.lost.as_mut().filter(|lost| !lost.tries && now_ns >= lost.next_try_ns) else {
            return false;
        };
        lost.tries = true;
        true
    }

    /// The next of its `slots` whose blocks are to be forgotten.
    pub fn to_forget(&mut self, slots: u32) -> std::ops::Range<u32> {
        let Some(lost) = &mut self.lost else { return 0..0 };
        let from = lost.forget_from;
        lost.forget_from = slots.min(from.saturating_add(FORGOTTEN_A_ROUND));
        from..lost.forget_from
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn errors_among_successes_lose_nothing_and_a_row_of_them_does() {
        let mut health = Health::default();
        for round in 0..100 {
            assert_eq!(health.ended(round % ERRORS_IN_A_ROW == 0, 0), Turn::None);
        }
        assert_eq!(health.ended(true, 0), Turn::None);
        let turns: Vec<Turn> = (0..ERRORS_IN_A_ROW).map(|_| health.ended(false, 0)).collect();
        assert_eq!(turns.iter().filter(|turn| **turn == Turn::Lost).count(), 1);
        assert_eq!(turns.last(), Some(&Turn::Lost));
    }

    #[test]
    fn a_lost_device_is_tried_less_and_less_often_and_is_back_with_the_first_success() {
        let mut health = Health::default();
        health.lose(0);
        let (mut now_ns, mut tries) = (0, Vec::new());
        while tries.len() < 9 {
            now_ns += 1_000_000_000;
            if health.may_try(now_ns) {
                assert!(!health.may_try(now_ns), "one at a time");
                tries.push(now_ns / 1_000_000_000);
                assert_eq!(health.ended(false, now_ns), Turn::None);
            }
        }
        let pauses: Vec<u64> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!((tries[0], pauses.as_slice()), (5, [10, 20, 40, 80, 160, 300, 300, 300].as_slice()));
        assert_eq!(health.ended(true, now_ns), Turn::Back);
        assert!(!health.is_lost());
    }

    #[test]
    fn who_ends_something_is_not_silent_and_one_transfer_is_not_waited_for_without_end() {
        const S: u64 = 1_000_000_000;
        let mut health = Health::default();
        assert!(!health.is_stalled(100 * S, 109 * S) && health.is_stalled(100 * S, 111 * S));
        health.ended(true, 108 * S);
        assert!(!health.is_stalled(100 * S, 117 * S), "something has ended since");
        for at in 109..140 {
            health.ended(true, at * S);
        }
        assert!(health.is_stalled(100 * S, 140 * S), "and the oldest still has not");
        health.lose(140 * S);
        assert!(!health.is_stalled(100 * S, 200 * S), "lost once");
    }

    #[test]
    fn every_slot_is_forgotten_once() {
        let mut health = Health::default();
        health.lose(0);
        let slots: Vec<u32> = std::iter::repeat_with(|| health.to_forget(150)).take(5).flatten().collect();
        assert!(slots.into_iter().eq(0..150));
    }
}

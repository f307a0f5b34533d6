//! How much may be written to the SSDs: drives wear out, and their vendors say in how many bytes a day.

const DAY_S: u128 = 86_400;
const NS: u128 = 1_000_000_000;

/// A bucket of bytes that fills evenly and holds an hour's worth.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    bytes_a_day: u64,
    /// Bytes that may be written now; below zero while what was begun is being paid off.
    left: i128,
    filled_ns: u64,
}

impl Budget {
    /// So much a day; `None` for as much as there is.
    pub fn new(bytes_a_day: Option<u64>) -> Option<Self> {
        bytes_a_day.map(|bytes_a_day| Self { bytes_a_day, left: i128::from(bytes_a_day / 24), filled_ns: 0 })
    }

    /// Whether another block may be written now.
    pub fn allows(&mut self, now_ns: u64) -> bool {
        if self.filled_ns == 0 {
            self.filled_ns = now_ns;
        }
        let passed_ns = u128::from(now_ns.saturating_sub(self.filled_ns));
        let earned = u128::from(self.bytes_a_day) * passed_ns / (DAY_S * NS);
        if earned > 0 {
            let most = i128::from(self.bytes_a_day / 24);
            self.left = (self.left + earned as i128).min(most);
            // The time that these bytes take, and not what is over of a byte.
            let earned_ns = earned * DAY_S * NS / u128::from(self.bytes_a_day.max(1));
            self.filled_ns += earned_ns as u64;
        }
        self.left > 0
    }

    /// A block is written.
    pub fn spend(&mut self, bytes: u64) {
        self.left -= i128::from(bytes);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_day_s_writes_are_a_day_s_budget_and_no_more() {
        const GB: u64 = 1 << 30;
        let mut budget = Budget::new(Some(100 * GB)).unwrap();
        let (mut written, block) = (0, 2 << 20);
        // Someone who always wants to write, for two days.
        for second in 1..=2 * 86_400u64 {
            while budget.allows(second * 1_000_000_000) {
                budget.spend(block);
                written += block;
            }
        }
        let expected = 200 * GB + 100 * GB / 24;
        assert!(written.abs_diff(expected) < 4 * GB / 100, "{written} of {expected}");
    }

    #[test]
    fn who_asks_often_loses_nothing() {
        let mut budget = Budget::new(Some(100 << 30)).unwrap();
        let mut written = 0u64;
        // Every 1.5 microseconds for a second.
        for turn in 1..=666_666u64 {
            while budget.allows(turn * 1500) {
                budget.spend(64 << 10);
                written += 64 << 10;
            }
        }
        let expected = (100u64 << 30) / 24 + (100u64 << 30) / 86_400;
        assert!(written.abs_diff(expected) <= 128 << 10, "{written} of {expected}");
    }

    #[test]
    fn a_quiet_night_is_not_made_up_for_all_at_once() {
        let mut budget = Budget::new(Some(24 << 20)).unwrap();
        assert!(budget.allows(1));
        budget.spend(1 << 20);
        assert!(!budget.allows(2));
        let mut burst = 0;
        while budget.allows(86_400_000_000_000) {
            budget.spend(4096);
            burst += 4096;
        }
        assert_eq!(burst, 1 << 20, "an hour's worth");
        assert!(Budget::new(None).is_none());
    }
}

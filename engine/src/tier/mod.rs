//! What holds it: the slots of each tier, and what lies on the disk.

pub mod disk;
pub mod header;
pub mod host;
pub mod piece;
pub mod table;

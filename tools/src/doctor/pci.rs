//! PCI devices, as sysfs tells of them.

use std::path::Path;

use super::read;

pub struct Device {
    /// 0000:3b:00.0
    pub address: String,
    /// Class, subclass and interface: 0x030200.
    pub class: String,
    pub vendor: String,
    /// Its NUMA node, where the firmware says one.
    pub node: Option<u32>,
}

/// All of them, in the order of their addresses.
pub fn devices(sys: &Path) -> Vec<Device> {
    let entries = std::fs::read_dir(sys.join("bus/pci/devices")).into_iter().flatten().flatten();
    let device = |entry: std::fs::DirEntry| {
        let field = |name| read(entry.path().join(name));
        let node = field("numa_node").and_then(|node| node.parse().ok());
        let address = entry.file_name().to_string_lossy().into_owned();
        Some(Device { address, class: field("class")?, vendor: field("vendor")?, node })
    };
    let mut devices: Vec<Device> = entries.filter_map(device).collect();
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    devices
}

#[cfg(test)]
pub mod test {
    use super::*;

    /// A device that is not there.
    pub fn device(sys: &Path, address: &str, class: &str, vendor: &str, node: i32) -> std::path::PathBuf {
        let path = sys.join("bus/pci/devices").join(address);
        std::fs::create_dir_all(&path).unwrap();
        for (name, text) in [("class", class), ("vendor", vendor), ("numa_node", &node.to_string())] {
            std::fs::write(path.join(name), format!("{text}\n")).unwrap();
        }
        path
    }

    #[test]
    fn a_node_that_nobody_knows_is_none() {
        let sys = tempfile::tempdir().unwrap();
        device(sys.path(), "0000:01:00.0", "0x010802", "0x144d", -1);
        device(sys.path(), "0000:00:03.0", "0x010802", "0x144d", 1);
        let found = devices(sys.path());
        assert_eq!(found.iter().map(|device| device.node).collect::<Vec<_>>(), [Some(1), None]);
    }
}

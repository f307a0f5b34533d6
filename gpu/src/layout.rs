//! How a block lies in an instance's KV memory: pages of tensors → runs of bytes. Pure.
//!
//! An engine keeps the KV of a block in one *page* of each of its tensors (a layer, or all layers in
//! one). Layers that share a block table are a *group*; a hybrid model has several, and a group whose
//! blocks are smaller than ours has several pages in one block. In the slot, a rank's part is the
//! concatenation, in this order, of groups, their pages, their tensors, each in the tensor's logical
//! (row-major) order: the same for every engine whose [`kvring_ipc::layout::Layout`] is equal.

use std::ops::Range;

use serde::Deserialize;

/// A page that is not there: its part of the slot is left alone.
pub const NO_PAGE: u32 = u32::MAX;

/// Most runs of one page: one of 128 tokens, 8 heads, keys and values apart has 2,048.
const RUNS_MAX: usize = 1 << 16;
/// No tensor is larger: sums of a few of these do not overflow.
const BYTES_MAX: usize = 1 << 48;
/// Most pages of one group in a block.
const PAGES_PER_BLOCK_MAX: usize = 4096;

/// A rank's KV memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMap {
    /// Where this rank's part begins in a slot.
    pub offset_in_slot: usize,
    /// In the order of their parts.
    pub groups: Vec<GroupMap>,
}

/// Tensors that share a block table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupMap {
    /// Pages of this group in one block.
    pub pages_per_block: usize,
    /// In the order of their parts.
    pub tensors: Vec<TensorMap>,
}

/// A tensor whose first dimension counts pages.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorMap {
    /// Where page 0 begins.
    pub address: usize,
    /// Bytes from there to the end of what may be touched.
    pub bytes: usize,
    /// How many pages.
    pub pages_count: usize,
    /// From one page to the next.
    pub page_stride_bytes: usize,
    /// Dimensions of one page.
    pub shape: Vec<usize>,
    /// Bytes between neighbours in each dimension.
    pub strides_bytes: Vec<usize>,
    /// Bytes of one element.
    pub element_bytes: usize,
}

/// Bytes that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// From the start of the page.
    pub offset_in_page: usize,
    /// How many.
    pub bytes: usize,
}

/// The runs of a page in logical order, neighbours joined. `None`: more than 65,536, or numbers that
/// no memory has.
pub fn runs(shape: &[usize], strides_bytes: &[usize], element_bytes: usize) -> Option<Vec<Run>> {
    // Everything below is at most the page's extent.
    let extent = shape.iter().zip(strides_bytes).try_fold(element_bytes, |extent, (count, stride)| {
        extent.checked_add(count.checked_sub(1)?.checked_mul(*stride)?)
    })?;
    let bytes = shape.iter().try_fold(element_bytes, |bytes, count| bytes.checked_mul(*count))?;
    if extent > BYTES_MAX || bytes > BYTES_MAX {
        return None;
    }
    // The innermost dimensions that lie without a gap are one run.
    let mut run_bytes = element_bytes;
    let mut dims: Vec<(usize, usize)> = shape.iter().copied().zip(strides_bytes.iter().copied()).collect();
    while let Some((count, stride)) = dims.last().copied() {
        if stride != run_bytes && count != 1 {
            break;
        }
        run_bytes *= count;
        dims.pop();
    }
    let mut runs: Vec<Run> = vec![];
    let total: usize = dims.iter().map(|(count, _)| count).product();
    if total > RUNS_MAX {
        return None;
    }
    for flat in 0..total {
        let mut rest = flat;
        let offset_in_page = dims.iter().rev().fold(0, |offset, (count, stride)| {
            let at = rest % count;
            rest /= count;
            offset + at * stride
        });
        match runs.last_mut() {
            Some(last) if last.offset_in_page + last.bytes == offset_in_page => last.bytes += run_bytes,
            _ => runs.push(Run { offset_in_page, bytes: run_bytes }),
        }
    }
    Some(runs)
}

impl TensorMap {
    /// (count, stride in bytes) of each dimension, pages included, where there is more than one.
    fn dimensions(&self) -> Vec<(usize, usize)> {
        let pages = (self.pages_count, self.page_stride_bytes);
        let of_page = self.shape.iter().copied().zip(self.strides_bytes.iter().copied());
        std::iter::once(pages).chain(of_page).filter(|(count, _)| *count > 1).collect()
    }

    /// Whether no two elements share a byte, as far as strides tell: each dimension steps over all that
    /// the smaller ones span. Views of a tensor in any order of its dimensions do.
    fn dimensions_are_apart(&self) -> bool {
        are_apart(self.dimensions(), self.element_bytes)
    }

    /// One past the last byte that belongs to a page, from the address.
    fn extent(&self) -> usize {
        let of = |(count, stride): &(usize, usize)| (count - 1).saturating_mul(*stride);
        self.dimensions().iter().map(of).fold(self.element_bytes, usize::saturating_add)
    }
}

/// Where each allocation begins, as far as the map tells.
fn allocations(map: &MemoryMap) -> Vec<usize> {
    let mut bounds: Vec<(usize, usize)> = map
        .groups
        .iter()
        .flat_map(|group| &group.tensors)
        .map(|tensor| (tensor.address, tensor.address.saturating_add(tensor.extent())))
        .collect();
    bounds.sort_unstable();
    let (mut starts, mut end) = (Vec::new(), 0);
    for (start, until) in bounds {
        if start >= end {
            starts.push(start);
        }
        end = end.max(until);
    }
    starts
}

fn allocation_of(starts: &[usize], address: usize) -> u32 {
    starts.partition_point(|start| *start <= address) as u32
}

fn are_apart(mut dimensions: Vec<(usize, usize)>, element_bytes: usize) -> bool {
    dimensions.sort_unstable_by_key(|(_, stride)| *stride);
    let mut extent = element_bytes;
    dimensions.into_iter().all(|(count, stride)| {
        let apart = stride >= extent;
        extent = extent.saturating_add((count - 1).saturating_mul(stride));
        apart
    })
}

/// Whether no two tensors of a group share a byte. Two that lie within one another's bounds (layers of one
/// allocation, keys beside values) must be equal but for where they begin: then the distance is one more
/// dimension. Groups may share memory: an engine gives a page to one of them at a time.
fn tensors_are_apart(group: &GroupMap) -> Result<(), String> {
    let mut tensors: Vec<_> = group.tensors.iter().enumerate().collect();
    tensors.sort_unstable_by_key(|(_, tensor)| tensor.address);
    for (index, (a_number, a)) in tensors.iter().enumerate() {
        let within = |(_, b): &&(usize, &TensorMap)| b.address < a.address.saturating_add(a.extent());
        for (b_number, b) in tensors[index + 1..].iter().take_while(within) {
            let distance = b.address - a.address;
            let dimensions = a.dimensions();
            let alike = dimensions == b.dimensions() && a.element_bytes == b.element_bytes;
            let with_distance = dimensions.into_iter().chain([(2, distance)]).collect();
            if distance == 0 || !alike || !are_apart(with_distance, a.element_bytes) {
                return Err(format!(
                    "tensors {a_number} and {b_number} of one group share bytes: each byte has one owner"
                ));
            }
        }
    }
    Ok(())
}

/// One tensor's part of a page's part of a slot.
#[derive(Debug)]
struct Part {
    /// Number of the tensor over all groups: engines compute tensors in this order.
    tensor: u32,
    /// Tensors that lie within one another's bounds are views of one allocation.
    allocation: u32,
    address: usize,
    pages_count: usize,
    page_stride_bytes: usize,
    offset_in_slot: usize,
    runs: Vec<Run>,
}

/// Bytes to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// In the instance's memory.
    pub address: usize,
    /// In the slot.
    pub offset_in_slot: usize,
    /// How many.
    pub bytes: usize,
    /// In which allocation, as far as the map tells: copies do not span two.
    pub allocation: u32,
}

/// Where the bytes of a block lie, worked out once.
#[derive(Debug)]
pub struct Placement {
    /// For each page of a block, in order.
    pages: Vec<Vec<Part>>,
    tensors_count: u32,
    slot_start: usize,
    slot_end: usize,
}

impl Placement {
    /// Works out and checks a map.
    ///
    /// # Errors
    /// Names what is wrong with which tensor.
    pub fn new(map: &MemoryMap) -> Result<Self, String> {
        let mut pages = Vec::new();
        let allocations = allocations(map);
        let mut offset_in_slot = map.offset_in_slot;
        let mut tensors_count = 0;
        for (group_index, group) in map.groups.iter().enumerate() {
            if group.pages_per_block > PAGES_PER_BLOCK_MAX || offset_in_slot > BYTES_MAX {
                return Err(format!(
                    "group {group_index}: more than {PAGES_PER_BLOCK_MAX} pages_per_block, or too large"
                ));
            }
            tensors_are_apart(group).map_err(|error| format!("group {group_index}: {error}"))?;
            for _ in 0..group.pages_per_block {
                let mut parts = Vec::new();
                for ((tensor_index, tensor), number) in group.tensors.iter().enumerate().zip(tensors_count..) {
                    let wrong = |what: &str| Err(format!("tensor {tensor_index} of group {group_index}: {what}"));
                    if tensor.shape.len() != tensor.strides_bytes.len() {
                        return wrong("shape and strides_bytes differ in length");
                    }
                    if tensor.shape.contains(&0) || tensor.element_bytes == 0 || tensor.pages_count == 0 {
                        return wrong("a dimension is 0");
                    }
                    let aliases = |(count, stride): (&usize, &usize)| *count > 1 && *stride == 0;
                    let pages_alias = tensor.pages_count > 1 && tensor.page_stride_bytes == 0;
                    if tensor.shape.iter().zip(&tensor.strides_bytes).any(aliases) || pages_alias {
                        return wrong("a stride of 0: two elements are one");
                    }
                    if !tensor.dimensions_are_apart() {
                        return wrong("its strides overlap: two elements share a byte");
                    }
                    if tensor.address == 0 || tensor.address.checked_add(tensor.bytes).is_none() {
                        return wrong("no memory lies at its address");
                    }
                    let Some(runs) = runs(&tensor.shape, &tensor.strides_bytes, tensor.element_bytes) else {
                        return wrong("a page falls into more than 65,536 runs of bytes: choose another layout");
                    };
                    let page_end = runs.iter().map(|run| run.offset_in_page + run.bytes).max().unwrap_or(0);
                    let end = (tensor.pages_count - 1)
                        .checked_mul(tensor.page_stride_bytes)
                        .and_then(|last| last.checked_add(page_end));
                    if end.is_none_or(|end| end > tensor.bytes) {
                        return wrong("its last page ends after its memory does");
                    }
                    let bytes: usize = runs.iter().map(|run| run.bytes).sum();
                    parts.push(Part {
                        tensor: number,
                        allocation: allocation_of(&allocations, tensor.address),
                        address: tensor.address,
                        pages_count: tensor.pages_count,
                        page_stride_bytes: tensor.page_stride_bytes,
                        offset_in_slot,
                        runs,
                    });
                    offset_in_slot += bytes;
                }
                pages.push(parts);
            }
            tensors_count += group.tensors.len() as u32;
        }
        if pages.is_empty() {
            return Err("no group has a page: there is no KV memory to cache".into());
        }
        Ok(Self { pages, tensors_count, slot_start: map.offset_in_slot, slot_end: offset_in_slot })
    }

    /// Tensors over all groups, numbered in their order.
    pub fn tensors_count(&self) -> u32 {
        self.tensors_count
    }

    /// Most runs that one block falls into.
    pub fn runs_per_block(&self) -> usize {
        self.pages.iter().flatten().map(|part| part.runs.len()).sum()
    }

    /// Where this rank's part of a slot begins.
    pub fn slot_start(&self) -> usize {
        self.slot_start
    }

    /// Pages that make one block.
    pub fn pages_per_block(&self) -> usize {
        self.pages.len()
    }

    /// Where this rank's part of a slot ends.
    pub fn slot_end(&self) -> usize {
        self.slot_end
    }

    /// How many pages there are to choose from, for each page of a block.
    pub fn pages_counts(&self) -> Vec<u32> {
        let count = |parts: &Vec<Part>| parts.iter().map(|part| part.pages_count).min().unwrap_or(0);
        self.pages.iter().map(|parts| u32::try_from(count(parts)).unwrap_or(NO_PAGE)).collect()
    }

    /// Whether every page is one of the tensors' or none.
    pub fn has_pages(&self, pages: &[u32]) -> bool {
        pages.len() == self.pages.len()
            && pages
                .iter()
                .zip(&self.pages)
                .all(|(page, parts)| *page == NO_PAGE || parts.iter().all(|part| (*page as usize) < part.pages_count))
    }

    /// What to copy of these tensors for a block that lies in these pages.
    ///
    /// # Panics
    /// If a page is not one of the tensors'.
    pub fn copies(&self, pages: &[u32], tensors: Range<u32>, mut copy: impl FnMut(Copy)) {
        assert!(self.has_pages(pages), "pages {pages:?} are not all there");
        for (page, parts) in pages.iter().zip(&self.pages).filter(|(page, _)| **page != NO_PAGE) {
            for part in parts.iter().filter(|part| tensors.contains(&part.tensor)) {
                let page_address = part.address + *page as usize * part.page_stride_bytes;
                let mut offset_in_slot = part.offset_in_slot;
                for run in &part.runs {
                    copy(Copy {
                        address: page_address + run.offset_in_page,
                        offset_in_slot,
                        bytes: run.bytes,
                        allocation: part.allocation,
                    });
                    offset_in_slot += run.bytes;
                }
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// Dense strides of `shape` when its dimensions lie in memory in the order `order`.
    fn strides(shape: &[usize], order: &[usize], element_bytes: usize) -> Vec<usize> {
        let mut strides = vec![0; shape.len()];
        let mut next = element_bytes;
        for dim in order.iter().rev() {
            strides[*dim] = next;
            next *= shape[*dim];
        }
        strides
    }

    proptest! {
        #[test]
        fn runs_visit_every_element_once_in_logical_order(
            shape in prop::collection::vec(1usize..5, 1..5),
            shuffle in any::<u64>(),
            element_bytes in prop::sample::select(vec![1usize, 2, 4]),
        ) {
            let mut order: Vec<usize> = (0..shape.len()).collect();
            let mut random = shuffle;
            for i in (1..order.len()).rev() {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                order.swap(i, (random >> 33) as usize % (i + 1));
            }
            let strides = strides(&shape, &order, element_bytes);
            let mut expected = Vec::new();
            for flat in 0..shape.iter().product::<usize>() {
                let mut rest = flat;
                let mut offset = 0;
                for (count, stride) in shape.iter().zip(&strides).rev() {
                    offset += rest % count * stride;
                    rest /= count;
                }
                expected.extend(offset..offset + element_bytes);
            }
            let runs = runs(&shape, &strides, element_bytes).unwrap();
            let visited: Vec<usize> =
                runs.iter().flat_map(|run| run.offset_in_page..run.offset_in_page + run.bytes).collect();
            prop_assert_eq!(visited, expected);
            let joined = runs.windows(2).all(|w| w[0].offset_in_page + w[0].bytes != w[1].offset_in_page);
            prop_assert!(joined, "neighbours are joined");
        }
    }

    fn tensor(address: usize, pages_count: usize) -> TensorMap {
        TensorMap {
            address,
            bytes: pages_count * 64,
            pages_count,
            page_stride_bytes: 64,
            shape: vec![2, 16],
            strides_bytes: vec![32, 2],
            element_bytes: 2,
        }
    }

    #[test]
    fn groups_pages_and_tensors_follow_one_another_in_the_slot_and_absent_pages_leave_a_gap() {
        let groups = vec![
            GroupMap { pages_per_block: 1, tensors: vec![tensor(1000, 4), tensor(2000, 4)] },
            GroupMap { pages_per_block: 2, tensors: vec![tensor(3000, 8)] },
        ];
        let placement = Placement::new(&MemoryMap { offset_in_slot: 4096, groups }).unwrap();
        assert_eq!((placement.pages_per_block(), placement.slot_end()), (3, 4096 + 256));
        let mut copies = Vec::new();
        placement.copies(&[3, NO_PAGE, 7], 0..3, |copy| copies.push((copy.address, copy.offset_in_slot, copy.bytes)));
        assert_eq!(copies, [(1192, 4096, 64), (2192, 4160, 64), (3448, 4288, 64)]);
        assert!(!placement.has_pages(&[4, 0, 0]) && !placement.has_pages(&[0, 0]) && placement.has_pages(&[0, 7, 7]));
    }

    fn refusal(tensors: Vec<TensorMap>) -> Option<String> {
        let groups = vec![GroupMap { pages_per_block: 1, tensors }];
        Placement::new(&MemoryMap { offset_in_slot: 0, groups }).err()
    }

    #[test]
    fn tensors_may_lie_within_one_another_and_share_no_byte() {
        // Two layers of one allocation, page by page: a page of each in turn.
        let layer = |at: usize| TensorMap { page_stride_bytes: 128, bytes: 1024, ..tensor(4096 + at, 4) };
        assert_eq!(refusal(vec![layer(0), layer(64)]), None);
        assert_eq!(refusal(vec![tensor(4096, 4), tensor(4096 + 256, 4)]), None);
        // Keys and values of one allocation: [2, pages, 32 bytes].
        let parts = TensorMap { page_stride_bytes: 32, strides_bytes: vec![128, 2], ..tensor(4096, 4) };
        assert_eq!(refusal(vec![parts]), None);
        for (wrong, tensors) in [
            ("share bytes", vec![layer(0), layer(32)]),
            ("share bytes", vec![tensor(4096, 4), tensor(4096, 4)]),
            ("share bytes", vec![tensor(4096, 4), tensor(4096 + 192, 4)]),
            ("overlap", vec![TensorMap { page_stride_bytes: 48, ..tensor(4096, 4) }]),
            ("overlap", vec![TensorMap { strides_bytes: vec![16, 2], ..tensor(4096, 4) }]),
        ] {
            let refusal = refusal(tensors).expect(wrong);
            assert!(refusal.contains(wrong), "{refusal}");
        }
    }

    #[test]
    fn a_tensor_that_ends_too_early_is_named() {
        let groups = vec![GroupMap {
            pages_per_block: 1,
            tensors: vec![tensor(64, 4), TensorMap { bytes: 255, ..tensor(4096, 4) }],
        }];
        let error = Placement::new(&MemoryMap { offset_in_slot: 0, groups }).unwrap_err();
        assert!(error.contains("tensor 1 of group 0") && error.contains("last page"), "{error}");
    }
}

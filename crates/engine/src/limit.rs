//! How much memory there is to use: the machine, and the memory cgroup this process lives in.
//!
//! A cgroup's limit kills, it does not say ENOMEM (fallocate, UFFDIO_COPY and pwrite alike). So the
//! default limit leaves a margin, and headroom is looked at before growth.

use std::fs;
use std::path::{Path, PathBuf};

/// The default limit is this share of what is available when it is first needed.
pub const AUTO_SHARE: f64 = 0.5;

/// Memory that is never used up under a cgroup limit: interpreter, stacks, kernel objects. Bytes.
pub const CGROUP_MARGIN: u64 = 48 << 20;

/// The memory cgroup of this process.
#[derive(Debug, Clone)]
pub struct Cgroup {
    folder: PathBuf,
    v2: bool,
}

impl Cgroup {
    /// The cgroup that limits this process, if one does.
    pub fn current() -> Option<Cgroup> {
        let text = fs::read_to_string("/proc/self/cgroup").ok()?;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let relative = path.trim_start_matches('/');
            if controllers.split(',').any(|name| name == "memory") {
                return Cgroup::first(&["/sys/fs/cgroup/memory"], relative, false);
            }
            if controllers.is_empty()
                && let Some(found) = Cgroup::first(
                    &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
                    relative,
                    true,
                )
            {
                return Some(found);
            }
        }
        None
    }

    /// In a container the path may name a folder that is not visible: then the mount's root is ours.
    fn first(mounts: &[&str], relative: &str, v2: bool) -> Option<Cgroup> {
        let probe = if v2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        mounts
            .iter()
            .flat_map(|mount| [Path::new(mount).join(relative), PathBuf::from(mount)])
            .find(|folder| folder.join(probe).exists())
            .map(|folder| Cgroup { folder, v2 })
    }

    fn number(folder: &Path, name: &str) -> Option<u64> {
        fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// The tightest limit of this cgroup and those above it, with the folder that sets it.
    fn tightest(&self) -> Option<(u64, PathBuf)> {
        let name = if self.v2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        let mut best: Option<(u64, PathBuf)> = None;
        for folder in self.folder.ancestors() {
            let Some(limit) = Cgroup::number(folder, name) else {
                if folder.join("cgroup.procs").exists() {
                    continue;
                }
                break;
            };
            // v1 says "no limit" with a number near the largest there is.
            if limit < 1 << 60 && best.as_ref().is_none_or(|(smallest, _)| limit < *smallest) {
                best = Some((limit, folder.to_path_buf()));
            }
        }
        best
    }

    /// The limit in bytes, if there is one.
    pub fn limit(&self) -> Option<u64> {
        self.tightest().map(|(limit, _)| limit)
    }

    /// Bytes that can still be charged before the kernel kills: limit less what cannot be reclaimed.
    /// Clean page cache counts as free.
    pub fn headroom(&self) -> Option<u64> {
        let (limit, folder) = self.tightest()?;
        let usage_name = if self.v2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let usage = Cgroup::number(&folder, usage_name)?;
        let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
        let field = |name: &str| -> u64 {
            stat.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
                .unwrap_or(0)
        };
        let (file, shmem, dirty) = if self.v2 {
            (
                field("file"),
                field("shmem"),
                field("file_dirty") + field("file_writeback"),
            )
        } else {
            (
                field("total_cache"),
                field("total_shmem"),
                field("total_dirty") + field("total_writeback"),
            )
        };
        let reclaimable = file.saturating_sub(shmem).saturating_sub(dirty);
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
    }
}

/// MemAvailable of the machine, bytes.
pub fn machine_available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .map_or(1 << 30, |kib| kib << 10)
}

/// The limit that "auto" stands for now, bytes.
pub fn auto() -> u64 {
    let machine = machine_available() as f64 * AUTO_SHARE;
    let cgroup = Cgroup::current()
        .and_then(|cgroup| cgroup.headroom())
        .map_or(f64::INFINITY, |room| {
            room.saturating_sub(CGROUP_MARGIN) as f64 * AUTO_SHARE
        });
    (machine.min(cgroup) as u64).max(8 << 20)
}

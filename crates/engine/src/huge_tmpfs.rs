//! Files whose pages are 2 MiB, without a sysctl.
//!
//! Unsafe: raw system calls for which the C library has no functions, and a short-lived child.
//!
//! A tmpfs mounted with huge=always gives huge pages whatever shmem_enabled says. The mount is never
//! attached to any folder: fsmount(2) gives a descriptor, a file is created in it with O_TMPFILE, and
//! the file stays good when the mount is gone. Who may not mount does it in a child in a user and mount
//! namespace of its own; the child shares the descriptor table, so the file is simply there afterwards.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::error::Error;

const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;

/// An unlinked file on a tmpfs of huge pages.
pub fn file() -> Result<File, Error> {
    let direct = create();
    if let Ok(fd) = direct {
        // SAFETY: create() returned a descriptor that nobody else knows.
        return Ok(unsafe { File::from(OwnedFd::from_raw_fd(fd)) });
    }
    match create_in_namespace() {
        // SAFETY: the child made the descriptor in the shared table and ended.
        Ok(fd) => Ok(unsafe { File::from(OwnedFd::from_raw_fd(fd)) }),
        Err(error) => Err(Error::Os {
            call: "mounting a private tmpfs of huge pages",
            errno: error.raw_os_error().unwrap_or(0),
            advice:
                "allow user namespaces (sysctl user.max_user_namespaces), reserve hugetlb pages \
                     (sysctl vm.nr_hugepages=N), or use pages=\"4KiB\""
                    .into(),
        }),
    }
}

/// Async-signal-safe: system calls on constants only, since it also runs in a raw child.
fn create() -> io::Result<RawFd> {
    let last = io::Error::last_os_error;
    // SAFETY: every pointer is a NUL-terminated constant or null where the call allows it; descriptors
    // are closed on every way out.
    unsafe {
        let context = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) as RawFd;
        if context < 0 {
            return Err(last());
        }
        let set = |key: &std::ffi::CStr, value: &std::ffi::CStr| {
            libc::syscall(
                libc::SYS_fsconfig,
                context,
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            )
        };
        let null = std::ptr::null::<libc::c_char>();
        let made = set(c"huge", c"always") == 0
            && set(c"size", c"0") == 0
            && libc::syscall(
                libc::SYS_fsconfig,
                context,
                FSCONFIG_CMD_CREATE,
                null,
                null,
                0,
            ) == 0;
        let error = last();
        if !made {
            libc::close(context);
            return Err(error);
        }
        let mount = libc::syscall(libc::SYS_fsmount, context, FSMOUNT_CLOEXEC, 0) as RawFd;
        let error = last();
        libc::close(context);
        if mount < 0 {
            return Err(error);
        }
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
        let fd = libc::openat(mount, c".".as_ptr(), flags, 0o600 as libc::c_uint);
        let error = last();
        libc::close(mount);
        if fd < 0 { Err(error) } else { Ok(fd) }
    }
}

fn create_in_namespace() -> io::Result<RawFd> {
    // SAFETY: these calls cannot fail.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    // Written by the child, made here: the child may not allocate.
    let maps = [
        (c"/proc/self/uid_map", format!("{user} {user} 1")),
        (c"/proc/self/setgroups", "deny".to_owned()),
        (c"/proc/self/gid_map", format!("{group} {group} 1")),
    ];
    let mut pipe = [0; 2];
    // SAFETY: pipe2 fills two descriptors; the child makes only system calls on memory that is its own
    // copy (no CLONE_VM), allocates nothing, takes no lock and leaves by _exit.
    unsafe {
        if libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        let child =
            libc::syscall(libc::SYS_clone, flags as libc::c_ulong, 0, 0, 0, 0) as libc::pid_t;
        if child == 0 {
            let answer = if libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) == 0 {
                for (path, text) in &maps {
                    let map = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                    libc::write(map, text.as_ptr().cast(), text.len());
                    libc::close(map);
                }
                create().unwrap_or_else(|error| -error.raw_os_error().unwrap_or(1))
            } else {
                -*libc::__errno_location()
            };
            libc::write(pipe[1], (&raw const answer).cast(), size_of::<i32>());
            libc::_exit(0);
        }
        let forked = io::Error::last_os_error();
        let mut answer = -libc::EIO;
        if child > 0 {
            let mut status = 0;
            while libc::waitpid(child, &mut status, 0) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
            // The child wrote before it ended, or never will: do not sleep for it.
            libc::fcntl(pipe[0], libc::F_SETFL, libc::O_NONBLOCK);
            libc::read(pipe[0], (&raw mut answer).cast(), size_of::<i32>());
        }
        libc::close(pipe[0]);
        libc::close(pipe[1]);
        if child < 0 {
            Err(forked)
        } else if answer < 0 {
            Err(io::Error::from_raw_os_error(-answer))
        } else {
            Ok(answer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_file_can_be_written_whichever_way_it_was_made() {
        let mut made = vec![create_in_namespace()];
        made.push(create());
        for way in made {
            match way {
                Ok(fd) => {
                    // SAFETY: the descriptor is fresh.
                    let file = unsafe { File::from(OwnedFd::from_raw_fd(fd)) };
                    file.set_len(4 << 20).unwrap();
                    file.write_all_at(b"x", 3 << 20).unwrap();
                    use std::os::unix::fs::MetadataExt;
                    // One byte took a whole huge page.
                    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 << 20);
                }
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
            }
        }
    }
}

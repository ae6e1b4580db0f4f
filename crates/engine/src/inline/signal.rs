//! The handler of SIGBUS: installing it, looking after it, and passing on what is not ours.
//!
//! A signal has one handler for the whole process, and others want it too. faulthandler.enable() takes it,
//! faulthandler.disable() puts back what it found at its own beginning, signal.signal(SIGBUS, f) takes it. So
//! whenever a region is opened, prefetched or asked for figures, [`look_after`] looks whether the handler is
//! still ours, and if not takes it again and remembers who had it. What is not ours goes there.
//!
//! That makes rings: ours passes to faulthandler's, which prints, puts back the handler it had found (ours),
//! and raises the signal again. A latch remembers the thread that is passing a signal on; what it raises itself
//! meanwhile gets the default action. And a handler that returns without having mended anything (Python's
//! own only sets a flag; a disabled faulthandler does nothing) would be called for ever, as the access is made
//! again: after so many equal faults in a row the default action ends it.
//!
//! The handler runs on the thread's own stack, however small: an alternate one may be smaller. All signals are
//! blocked while it runs, but for those that a mistake in it would raise, and SIGBUS itself, which faulthandler
//! raises from inside.
//!
//! Unsafe: sigaction(2), and a signal handler's arguments.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};

use super::regions::Found;
use super::resolve::Signals;
use crate::engine::Engine;
use crate::error::Error;

/// Who had SIGBUS before us. Never freed: a handler may be looking at it.
static PREVIOUS: AtomicPtr<sigaction> = AtomicPtr::new(ptr::null_mut());

/// The thread that is passing a signal on.
static PASSING: AtomicUsize = AtomicUsize::new(0);

/// The last fault that was passed on, and how often in a row it has come.
static LAST: AtomicUsize = AtomicUsize::new(0);
static REPEATED: AtomicU32 = AtomicU32::new(0);

/// So many equal faults are passed on in a row.
const PATIENCE: u32 = 4096;

/// True once the handler has been installed.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Signals that stay open: what a mistake in the handler raises, and SIGBUS.
const OPEN: [c_int; 6] = [
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGABRT,
];

/// This thread, as walks and pools know it: no system call, and never 0.
pub(super) fn this_thread() -> u32 {
    // Stacks are apart by more than 64 bytes, and close enough together for the rest to fit.
    // SAFETY: no preconditions.
    let address = unsafe { libc::pthread_self() } as usize;
    ((address >> 6) as u32) | 1
}

fn me() -> usize {
    // SAFETY: no preconditions.
    unsafe { libc::pthread_self() as usize }
}

/// Sees to it that a touch of a region with `fault="inline"` is answered: the handler of SIGBUS is ours, and
/// SIGBUS is not blocked in this thread. Does nothing as long as there is no such region.
pub(crate) fn look_after() -> Result<(), Error> {
    if !WANTED.load(Ordering::Acquire) {
        return Ok(());
    }
    install()?;
    let mut mask = MaybeUninit::uninit();
    // SAFETY: pthread_sigmask fills the set in.
    let blocked = unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr());
        libc::sigismember(mask.as_ptr(), libc::SIGBUS) == 1
    };
    if blocked {
        return Err(Error::Invalid(
            "SIGBUS is blocked in this thread: with fault=\"inline\" its next touch of an absent page would end \
             the process; unblock it with signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS}), or use \
             fault=\"threads\""
                .into(),
        ));
    }
    Ok(())
}

/// Sees to it that the handler of SIGBUS is ours, if any region needs it.
pub(crate) fn keep_handler() {
    if WANTED.load(Ordering::Acquire) {
        // It was installed once, so it can be.
        let _ = install();
    }
}

/// As [`look_after`], for callers that cannot fail: what is wrong is said, once.
pub(crate) fn look_after_or_say() {
    static SAID: AtomicBool = AtomicBool::new(false);
    if let Err(error) = look_after()
        && !SAID.swap(true, Ordering::Relaxed)
    {
        crate::say::line(&format!("userfault: {error}"));
    }
}

/// From here on [`look_after`] has something to look after.
pub(super) fn serve() {
    WANTED.store(true, Ordering::Release);
}

fn ours(action: &sigaction) -> bool {
    action.sa_sigaction == on_sigbus as *const () as usize
}

fn install() -> Result<(), Error> {
    let failed = || Error::last_os("sigaction(SIGBUS)", "");
    let mut found = MaybeUninit::<sigaction>::zeroed();
    // SAFETY: sigaction fills `found` in, and zeros are a valid one; the new action has all its fields set,
    // and its function is there as long as the process.
    unsafe {
        if libc::sigaction(libc::SIGBUS, ptr::null(), found.as_mut_ptr()) < 0 {
            return Err(failed());
        }
        let before = found.assume_init();
        if ours(&before) {
            return Ok(());
        }
        // Known before it is needed.
        PREVIOUS.store(Box::into_raw(Box::new(before)), Ordering::SeqCst);
        let mut action: sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_RESTART;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in OPEN {
            libc::sigdelset(&raw mut action.sa_mask, signal);
        }
        if libc::sigaction(libc::SIGBUS, &raw const action, found.as_mut_ptr()) < 0 {
            return Err(failed());
        }
        let replaced = found.assume_init();
        if !ours(&replaced) && replaced.sa_sigaction != before.sa_sigaction {
            // Somebody was faster.
            PREVIOUS.store(Box::into_raw(Box::new(replaced)), Ordering::SeqCst);
        }
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the thread's own errno; `info` and `context` are the kernel's, as SA_SIGINFO has them.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let served =
            (*info).si_code == libc::BUS_ADRERR && served((*info).si_addr() as usize, context);
        *errno = before;
        if !served {
            pass_on(signal, info, context);
            *errno = before;
        }
    }
}

/// True if the access at `address` should be made again.
fn served(address: usize, context: *mut c_void) -> bool {
    let Some(engine) = Engine::existing() else {
        return false;
    };
    let Some(inline) = engine.inline() else {
        return false;
    };
    match inline.regions.at(address) {
        Found::Nothing => false,
        Found::Closed => true,
        Found::Region(reading) => {
            engine.touched(inline, reading.body, address, &Interrupted(context))
        }
    }
}

/// The mask of the interrupted program, in the handler's arguments.
struct Interrupted(*mut c_void);

fn set_mask(mask: *const c_void) {
    // SAFETY: a set is 8 bytes long for the kernel, and `mask` points to one.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            mask,
            ptr::null_mut::<c_void>(),
            8,
        )
    };
}

impl Signals for Interrupted {
    fn open(&self) {
        let context = self.0.cast::<libc::ucontext_t>();
        // SAFETY: the context is the kernel's.
        set_mask(unsafe { &raw const (*context).uc_sigmask }.cast());
    }

    fn close(&self) {
        let open = OPEN
            .iter()
            .fold(0u64, |set, signal| set | 1 << (signal - 1));
        let closed = !open;
        set_mask((&raw const closed).cast());
    }
}

/// Gives a signal to whoever had SIGBUS before us.
///
/// # Safety
/// The arguments are those of a handler.
unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: `info` is the kernel's, and what PREVIOUS points to is never freed.
    let (code, address, previous) = unsafe {
        (
            (*info).si_code,
            (*info).si_addr() as usize,
            PREVIOUS.load(Ordering::SeqCst).as_ref(),
        )
    };
    let raised = code <= 0;
    if raised && PASSING.load(Ordering::SeqCst) == me() {
        return default_action(raised);
    }
    let Some(previous) = previous else {
        return default_action(raised);
    };
    match previous.sa_sigaction {
        libc::SIG_IGN if raised => return,
        // The kernel, too, lets nobody ignore a fault.
        libc::SIG_DFL | libc::SIG_IGN => return default_action(raised),
        _ => {}
    }
    if !raised {
        let fault = address ^ me().rotate_left(17);
        let again = LAST.swap(fault, Ordering::SeqCst) == fault;
        if !again {
            REPEATED.store(0, Ordering::SeqCst);
        } else if REPEATED.fetch_add(1, Ordering::SeqCst) >= PATIENCE {
            return default_action(raised);
        }
    }
    let outer = PASSING.swap(me(), Ordering::SeqCst);
    Interrupted(context).open();
    // SAFETY: the address is that of a handler which was installed with these flags.
    unsafe {
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                std::mem::transmute(previous.sa_sigaction);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = std::mem::transmute(previous.sa_sigaction);
            handler(signal);
        }
    }
    PASSING.store(outer, Ordering::SeqCst);
}

/// Ends the process as if nobody had a handler: at once if the signal was sent, else when the access is made
/// again.
fn default_action(raised: bool) {
    // SAFETY: zeros with SIG_DFL are a valid action; raise(3) may be called in a handler.
    unsafe {
        let mut action: sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        if raised {
            libc::raise(libc::SIGBUS);
        }
    }
}

//! Gives memory back that only the start or a burst of work needed.
//!
//! Most of a resting agent's resident memory is code and constants: its start runs through much
//! of the program and of the libraries that it is linked with (libvirt brings some forty), the
//! kernel maps sixteen pages for each one touched, and all stays mapped until the machine is
//! short of memory. [`trim`] unmaps it. What is used again is mapped again from the page cache, a
//! fraction of a microsecond a page; what is not used stays away.
#![expect(unsafe_code, reason = "the dynamic linker's list and madvise are calls into C")]

use std::time::Duration;

use nix::libc;
use nix::unistd::{SysconfVar, sysconf};
use tokio_util::sync::CancellationToken;

/// When memory is first given back: by then the agent has made its first pass and reported.
const FIRST: Duration = Duration::from_secs(5);

/// How often from then on. Rarely enough to cost nothing, for the agent and for its latency.
const EVERY: Duration = Duration::from_secs(600);

/// Gives memory back soon after the start and now and then, until `stop`.
pub(crate) async fn keep_small(stop: CancellationToken) {
    let mut wait = FIRST;
    while stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
        trim();
        wait = EVERY;
    }
}

/// Unmaps the code and constants of the program and its libraries, and has the allocator return
/// what it keeps in reserve. Nothing that was written is touched.
pub(crate) fn trim() {
    let Some(page) = sysconf(SysconfVar::PAGE_SIZE).ok().flatten() else { return };
    let Ok(mut page) = usize::try_from(page) else { return };
    let page: *mut usize = &raw mut page;
    // SAFETY: the callback takes `data` for the page's size, which outlives the call, and neither
    // panics nor loads or unloads a library.
    unsafe { libc::dl_iterate_phdr(Some(unmap_constants), page.cast()) };
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; the allocator locks what it works on.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps what one loaded object has mapped read-only from its file.
unsafe extern "C" fn unmap_constants(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: `trim` passes the page's size, and the dynamic linker a description that is valid
    // during the call, with as many headers as it says.
    let (info, page, headers) = unsafe {
        let info = &*info;
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum));
        (info, *data.cast::<usize>(), headers)
    };
    for header in headers {
        let constant = header.p_type == libc::PT_LOAD
            && header.p_flags & libc::PF_W == 0
            && header.p_memsz == header.p_filesz;
        let range = usize::try_from(info.dlpi_addr.wrapping_add(header.p_vaddr))
            .ok()
            .zip(usize::try_from(header.p_memsz).ok())
            .and_then(|(start, size)| Some((start, start.checked_add(size)?)));
        let (true, Some((start, end))) = (constant, range) else { continue };
        let start = start / page * page;
        let length = end.next_multiple_of(page) - start;
        // SAFETY: the segment is mapped from a file, never writable and so never changed: the
        // dynamic linker's own changes go to writable segments. Its pages read the same when they
        // are mapped again. The linker holds its lock, so the object stays. Where the kernel
        // refuses (locked pages, its own vdso), all stays as it was.
        unsafe {
            libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED)
        };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_file_kib() -> u64 {
        procfs::process::Process::myself().unwrap().status().unwrap().rssfile.unwrap()
    }

    #[test]
    fn code_that_is_not_used_goes_and_comes_back_when_it_is() {
        let work = || jiff::Timestamp::UNIX_EPOCH.strftime("%A, %d %B %Y").to_string();
        let before = (work(), resident_file_kib());
        trim();
        let after = resident_file_kib();
        assert!(after < before.1 / 2, "{} KiB before, {after} KiB after", before.1);
        assert_eq!(work(), before.0);
        trim();
        assert_eq!(work(), before.0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_with_the_process() {
        let stop = CancellationToken::new();
        let keeping = tokio::spawn(keep_small(stop.clone()));
        tokio::time::sleep(FIRST + EVERY * 2).await;
        assert!(!keeping.is_finished());
        stop.cancel();
        keeping.await.unwrap();
    }
}

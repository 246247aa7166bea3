//! A private network namespace per test, or a whole host.

use std::future::Future;
use std::panic::resume_unwind;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread of its own, inside a new and empty network namespace.
///
/// The namespace belongs to the thread: it ends with it, with every link, table and socket in
/// it, also when the test panics. So tests run side by side and may use the same names. The
/// runtime is a current-thread one; work that `test` spawns stays in the namespace, but work on
/// the blocking pool (`spawn_blocking`, `tokio::fs`) runs there only because its threads are
/// started by this one.
///
/// Where the privilege is missing the test does not run; see [`missing`](crate::missing). Without
/// root it can still be had: `unshare -Urn cargo test …`.
///
/// # Panics
///
/// With the panic of `test`, or when the namespace is demanded and cannot be made.
pub fn in_netns<Test, Fut>(test: Test)
where
    Test: FnOnce() -> Fut + Send,
    Fut: Future<Output = ()>,
{
    on_a_thread(CloneFlags::CLONE_NEWNET, test);
}

/// As [`in_netns`], with a mount namespace of its own and an empty `/run`, so that names of network
/// namespaces that `test` makes are its own, too: a host.
///
/// # Panics
///
/// As [`in_netns`].
pub fn on_a_host<Test, Fut>(test: Test)
where
    Test: FnOnce() -> Fut + Send,
    Fut: Future<Output = ()>,
{
    on_a_thread(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS, test);
}

fn on_a_thread<Test, Fut>(spaces: CloneFlags, test: Test)
where
    Test: FnOnce() -> Fut + Send,
    Fut: Future<Output = ()>,
{
    let body = move || {
        if let Err(errno) = unshare(spaces) {
            crate::missing(&format!(
                "namespaces cannot be made ({errno}); be root, or prefix `unshare -Urn`"
            ));
            return;
        }
        if spaces.contains(CloneFlags::CLONE_NEWNS) {
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                .expect("mounts can be kept to this thread");
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>)
                .expect("an empty /run can be mounted");
        }
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be built")
            .block_on(test());
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(body).join()) {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_test_sees_its_own_loopback_alone() {
        let outside = fs::read_link("/proc/thread-self/ns/net").unwrap();
        in_netns(|| async {
            assert_ne!(fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
            let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let names: Vec<_> =
                links.lines().skip(2).filter_map(|line| line.split(':').next()).collect();
            assert!(names.iter().any(|name| name.trim() == "lo"), "{links}");
        });
        assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
    }

    #[test]
    #[should_panic(expected = "on purpose")]
    fn a_panic_inside_fails_the_test() {
        in_netns(|| async { panic!("on purpose") });
    }
}

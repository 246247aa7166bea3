//! A host for tests: a thread with network and mount namespaces of its own.

use std::future::Future;
use std::panic::resume_unwind;
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread that has its own network links and its own names of namespaces.
/// Everything ends with the thread, also when the test panics.
pub(crate) fn on_a_host<Test, Fut>(test: Test)
where
    Test: FnOnce() -> Fut + Send,
    Fut: Future<Output = ()>,
{
    let body = move || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS) {
            stackhand_testkit::missing(&format!("namespaces cannot be made ({errno}); be root"));
            return;
        }
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(body).join()) {
        resume_unwind(panic);
    }
}

/// Threads for kernels; cheap to clone. Results never depend on it. Small work runs on the calling thread.
#[derive(Clone, Debug)]
pub struct Pool {
    threads: usize,
}
impl Pool {
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1) }
    }
    pub fn threads(&self) -> usize {
        self.threads
    }
}

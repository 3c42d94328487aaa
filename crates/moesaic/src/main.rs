//! `moesaic`: the command line a person uses. All of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic::main()
}

//! A `protoc` that build scripts can run: reads the arguments that prost-build passes and writes the descriptor set
//! with protox. Anything else it is asked for is an error, never ignored.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use prost::Message;

fn main() -> Result<()> {
    let mut includes: Vec<PathBuf> = Vec::new();
    let mut files: Vec<PathBuf> = Vec::new();
    let mut out: Option<PathBuf> = None;
    let (mut imports, mut source_info) = (false, false);

    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = |flag: &str| args.next().with_context(|| format!("{flag} needs a value"));
        match arg.as_str() {
            "--include_imports" => imports = true,
            "--include_source_info" => source_info = true,
            "--experimental_allow_proto3_optional" => {}
            "-o" => out = Some(value("-o")?.into()),
            "-I" => includes.push(value("-I")?.into()),
            _ if arg.starts_with("--descriptor_set_out=") => out = Some(arg["--descriptor_set_out=".len()..].into()),
            _ if arg.starts_with("--proto_path=") => includes.push(arg["--proto_path=".len()..].into()),
            _ if arg.starts_with("-I") => includes.push(arg[2..].into()),
            _ if arg.starts_with('-') => bail!("unknown argument {arg}: this protoc only writes descriptor sets"),
            _ => files.push(arg.into()),
        }
    }
    let out = out.context("no output: pass -o FILE")?;
    let mut compiler = protox::Compiler::new(&includes)?;
    compiler.include_imports(imports).include_source_info(source_info).open_files(&files)?;
    std::fs::write(&out, compiler.file_descriptor_set().encode_to_vec())
        .with_context(|| format!("cannot write {}", out.display()))
}

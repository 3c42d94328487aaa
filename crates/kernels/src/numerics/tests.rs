//! Names of numerics, and which a processor takes.

use super::*;

#[test]
fn names() {
    let cases = [
        (Numerics::portable(Dtype::F32), "f32", "portable"),
        (Numerics::portable(Dtype::Bf16), "bf16-fma", "portable"),
        (Numerics::detect(Dtype::F32), "f32", Isa::best().name()),
        (Numerics::detect(Dtype::Bf16).as_f32(), "f32", Isa::best().name()),
        (DtypeChoice::Int8.numerics().as_f32(), "f32", Isa::best().name()),
        (DtypeChoice::Int8.numerics().unquantised(), "bf16-fma", Isa::best().name()),
        (DtypeChoice::Bf16Dp.numerics().unquantised(), "bf16-dp", Isa::best().name()),
    ];
    for (n, name, isa) in cases {
        assert_eq!((n.name(), n.isa()), (name, isa), "{n:?}");
    }
}

#[test]
fn bf16_takes_the_dot_product_where_it_is_faster() {
    let name = if Isa::best().has_fast_dot_pairs() { "bf16-dp" } else { "bf16-fma" };
    assert_eq!(Numerics::detect(Dtype::Bf16).name(), name);
}

#[test]
fn all_are_every_name_on_every_instruction_set() {
    let all: Vec<(&str, &str)> = Numerics::all().iter().map(|n| (n.name(), n.isa())).collect();
    let pairs = |isa: Isa| ["f32", "bf16-fma", "bf16-dp", "int8"].map(|name| (name, isa.name()));
    let expected: Vec<(&str, &str)> = Isa::available().into_iter().flat_map(pairs).collect();
    assert_eq!(all, expected);
}

#[test]
fn dtypes_are_read() {
    let here = Numerics::detect(Dtype::Bf16).name();
    let by_themselves = ["f32", "bf16-fma", "bf16-dp", "int8"].map(|name| (name, name));
    for (dtype, name) in by_themselves.into_iter().chain([("bf16", here)]) {
        let numerics = dtype.parse::<DtypeChoice>().unwrap().numerics();
        assert_eq!((numerics.name(), numerics.isa()), (name, Isa::best().name()), "{dtype}");
    }
    for wrong in ["", "F32", "f16", " bf16", "bf16_dp", "i8"] {
        let error = wrong.parse::<DtypeChoice>().unwrap_err();
        let expected = format!("dtype `{wrong}` is none of `f32`, `bf16`, `bf16-fma`, `bf16-dp` and `int8`");
        assert_eq!(error.to_string(), expected);
    }
}

//! Frames there and back, and every way in which one can be wrong.

use proptest::prelude::*;

use super::*;

const SHAPE: Shape = Shape { hidden: 4, experts: 8 };

const HEADER: Header = Header {
    epoch: Epoch(0x0403_0201),
    layer: LayerId(5),
    micro_batch: 6,
    flags: FLAG_F32,
    source: 0x0a09,
    slot: 0,
    sequence: 0x100f_0e0d,
};

/// Two rows; the sum of experts 1 and 3 of the first, expert 7 of the second as it is.
fn request() -> v1::Frame {
    let content = Content {
        rows: vec![0, 1],
        outputs: vec![Output::sum(0, 2), Output::single(1)],
        terms: vec![term(1, 0.5), term(3, 0.25), term(7, 1.0)],
    };
    let rows: Vec<f32> = (0..2 * SHAPE.hidden).map(|i| i as f32).collect();
    RequestFrame::new(HEADER, rows.into(), SHAPE.hidden, content).encode(SHAPE.hidden)
}

fn term(expert: u16, weight: f32) -> Term {
    Term::new(ExpertId(expert), weight)
}

fn decode(frame: v1::Frame) -> Result<RequestFrame, FrameError> {
    RequestFrame::decode(Header::decode(&frame.header)?, frame, SHAPE)
}

fn bytes<T: Pod>(values: &[T]) -> Bytes {
    Bytes::copy_from_slice(bytemuck::cast_slice(values))
}

fn header(change: impl Fn(&mut Header)) -> Bytes {
    let mut header = HEADER;
    change(&mut header);
    bytes(&header.encode())
}

#[test]
fn a_headers_bytes_are_where_the_protocol_says() {
    let header = Header { flags: 0x0807, slot: 0x0c0b, layer: LayerId(5), ..HEADER };
    let encoded: Vec<u8> = (1..=16).collect();
    assert_eq!(header.encode()[..], encoded);
    assert_eq!(Header::decode(&encoded), Ok(header));
}

#[test]
fn a_request_is_laid_out_as_the_protocol_says() {
    let frame = request();
    assert_eq!(frame.header[6..8], [4, 0], "bit 2: rows are f32");
    assert_eq!(frame.rows, bytes(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    // row u16, terms u16 with bit 15 for a weighted sum
    assert_eq!(frame.outputs[..], [0, 0, 2, 0x80, 1, 0, 1, 0]);
    // expert u16, zero u16, weight f32
    assert_eq!(frame.terms[..8], [1, 0, 0, 0, 0, 0, 0, 0x3f]);
    assert_eq!(frame.refusal, None);
}

#[test]
fn a_valid_request_is_read_as_it_was_meant() {
    let frame = decode(request()).unwrap();
    assert_eq!((frame.header, frame.row_count(), frame.output_count()), (HEADER, 2, 2));
    assert_eq!((frame.position(0), frame.position(1)), (0, 1));
    let outputs: Vec<_> = frame.outputs().map(|(o, terms)| (o.row(), o.is_weighted(), terms.to_vec())).collect();
    let expected = [(0, true, vec![term(1, 0.5), term(3, 0.25)]), (1, false, vec![term(7, 1.0)])];
    assert_eq!(outputs, expected);
}

#[test]
fn each_way_in_which_a_request_can_be_wrong_has_its_error() {
    type Break = fn(&mut v1::Frame);
    let answers_max = PAYLOAD_BYTES_MAX / (SHAPE.hidden * 4);
    let table: [(Break, &str); 24] = [
        (|f| f.header = Bytes::new(), "header: 0 bytes; expected 16"),
        (|f| f.header = f.header.slice(..15), "header: 15 bytes; expected 16"),
        (|f| f.header = bytes(&[0u8; 17]), "header: 17 bytes; expected 16"),
        (
            |f| f.header = header(|h| h.flags = 8),
            "header: flags are 0x0008; expected a request's: 0, or 4 for f32 rows",
        ),
        (
            |f| f.header = header(|h| h.flags = 5),
            "header: flags are 0x0005; expected a request's: 0, or 4 for f32 rows",
        ),
        (|f| f.header = header(|h| h.slot = 3), "header: slot is 3; expected 0 on this transport"),
        (|f| f.rows = Bytes::new(), "rows: 0 bytes; expected 1 to 4096 rows of 16 bytes"),
        (|f| f.rows = f.rows.slice(..31), "rows: 31 bytes; expected 1 to 4096 rows of 16 bytes"),
        (|f| f.rows = vec![0; 4097 * 16].into(), "rows: 65552 bytes; expected 1 to 4096 rows of 16 bytes"),
        (
            |f| (f.header, f.rows) = (header(|h| h.flags = 0), f.rows.slice(..12)),
            "rows: 12 bytes; expected 1 to 4096 rows of 8 bytes",
        ),
        (|f| f.outputs = f.outputs.slice(..7), "outputs: 7 bytes; expected a multiple of 4"),
        (|f| f.terms = f.terms.slice(..23), "terms: 23 bytes; expected a multiple of 8"),
        (|f| f.outputs = Bytes::new(), "outputs: 0; expected 1 to 4194304, so that the answer fits a frame"),
        (
            |f| f.outputs = vec![0; (PAYLOAD_BYTES_MAX / 16 + 1) * 4].into(),
            "outputs: 4194305; expected 1 to 4194304, so that the answer fits a frame",
        ),
        (|f| f.outputs = bytes(&[Output::single(2)]), "outputs[0]: row 2 of a frame with 2 rows"),
        (
            |f| f.outputs = bytes(&[Output::sum(0, 3), Output::sum(1, 0)]),
            "outputs[1]: 0 terms of 0 that are left; expected at least 1, and 1 if not weighted",
        ),
        (
            |f| f.outputs = bytes(&[Output::single(0), Output { row: 1, terms: 2 }]),
            "outputs[1]: 2 terms of 2 that are left; expected at least 1, and 1 if not weighted",
        ),
        (
            |f| f.outputs = bytes(&[Output::sum(0, 2), Output::sum(1, 2)]),
            "outputs[1]: 2 terms of 1 that are left; expected at least 1, and 1 if not weighted",
        ),
        (|f| f.outputs = bytes(&[Output::sum(0, 2)]), "terms: 1 belong to no output"),
        (
            |f| f.terms = bytes(&[term(1, 0.5), term(8, 0.5), term(7, 1.0)]),
            "outputs[0]: expert 8; the model has 8 a layer",
        ),
        (
            |f| f.terms = bytes(&[term(3, 0.5), term(1, 0.5), term(7, 1.0)]),
            "outputs[0]: expert 1 after expert 3; experts must ascend",
        ),
        (
            |f| f.terms = bytes(&[term(3, 0.5), term(3, 0.5), term(7, 1.0)]),
            "outputs[0]: expert 3 after expert 3; experts must ascend",
        ),
        (
            |f| f.terms = bytes(&[term(1, 0.5), term(3, 0.5), Term { expert: 7, zero: 0x100, weight: 1.0 }]),
            "outputs[1]: a term's reserved bytes are 0x0100; expected 0",
        ),
        (
            |f| f.terms = bytes(&[term(1, 0.5), term(3, f32::NAN), term(7, 1.0)]),
            "outputs[0]: expert 3 has weight NaN; expected a finite number",
        ),
    ];
    assert_eq!(answers_max, 4_194_304);
    for (break_it, expected) in table {
        let mut frame = request();
        break_it(&mut frame);
        assert_eq!(decode(frame).unwrap_err().to_string(), expected);
    }
}

/// The weight of a single output is not used, and still a number.
#[test]
fn a_weight_that_is_no_number_is_refused_wherever_it_is() {
    for weight in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for output in 0..2 {
            let mut terms = [term(1, 0.5), term(3, 0.25), term(7, 1.0)];
            terms[output + 1].weight = weight;
            let error = decode(v1::Frame { terms: bytes(&terms), ..request() }).unwrap_err();
            let FrameError::Weight { output: place, expert, weight: given } = error else { panic!("{error}") };
            assert_eq!((place, expert, given.to_bits()), (output, [3, 7][output], weight.to_bits()));
        }
    }
}

fn answer() -> AnswerFrame {
    AnswerFrame::new(HEADER, Ok(vec![1.0, 2.0].into()))
}

fn refused() -> AnswerFrame {
    AnswerFrame::new(HEADER, Err(Refusal::new(RefusalReason::Busy, "full")))
}

#[test]
fn an_answer_and_a_refusal_come_back_as_they_were() {
    for (sent, flags) in [(answer(), 0b101), (refused(), 0b111)] {
        let back = AnswerFrame::decode(sent.clone().encode()).unwrap();
        assert_eq!(back.header, Header { flags, ..HEADER });
        assert_eq!(
            back.result.map(|values| values.brought().to_vec()),
            sent.result.map(|values| values.brought().to_vec())
        );
    }
    assert_eq!(answer().encode().rows, bytes(&[1.0f32, 2.0]));
}

#[test]
fn a_refusal_for_a_reason_of_a_later_version_is_still_a_refusal() {
    let mut frame = refused().encode();
    frame.refusal = Some(v1::Refusal { reason: 99, detail: "new".into() });
    let refusal = AnswerFrame::decode(frame).unwrap().result.unwrap_err();
    assert_eq!(refusal, Refusal::new(RefusalReason::Unspecified, "new"));
}

#[test]
fn each_way_in_which_an_answer_can_be_wrong_has_its_error() {
    type Break = fn(&mut v1::Frame);
    let flags = |flags: u16| format!("header: flags are {flags:#06x}; expected an answer's: 5, or 7 and a refusal");
    let table: [(AnswerFrame, Break, String); 8] = [
        (answer(), |f| f.header = f.header.slice(1..), "header: 15 bytes; expected 16".into()),
        (answer(), |f| f.header = header(|h| h.flags = FLAG_F32), flags(4)),
        (answer(), |f| f.header = header(|h| h.flags = FLAG_ANSWER), flags(1)),
        (answer(), |f| f.header = header(|h| h.flags = 13), flags(13)),
        (answer(), |f| f.header = header(|h| h.flags = 7), flags(7)),
        (answer(), |f| f.refusal = Some(v1::Refusal::default()), flags(5)),
        (refused(), |f| f.refusal = None, flags(7)),
        (answer(), |f| f.rows = f.rows.slice(1..), "rows: 7 bytes; expected 1 to 4096 rows of 4 bytes".into()),
    ];
    for (valid, break_it, expected) in table {
        let mut frame = valid.encode();
        break_it(&mut frame);
        assert_eq!(AnswerFrame::decode(frame).unwrap_err().to_string(), expected);
    }
}

/// Rows of a call, those of them that a frame has, and what it asks for.
fn content() -> impl Strategy<Value = (usize, Content)> {
    let output =
        (any::<prop::sample::Index>(), prop::collection::btree_set(0..SHAPE.experts as u16, 1..5), any::<bool>());
    let output = (output, prop::collection::vec(-1e30f32..1e30, 4));
    let some_rows = (1usize..9)
        .prop_flat_map(|rows| (Just(rows), prop::sample::subsequence((0..rows as u32).collect::<Vec<_>>(), 1..=rows)));
    (some_rows, prop::collection::vec(output, 1..10)).prop_map(|((call_rows, rows), outputs)| {
        let mut content = Content { rows, ..Content::default() };
        for ((row, experts, single), weights) in outputs {
            let row = row.index(content.rows.len()) as u16;
            let terms = experts.iter().zip(weights).map(|(&expert, weight)| term(expert, weight));
            let terms: Vec<Term> = if single { terms.take(1).collect() } else { terms.collect() };
            content.outputs.push(if single { Output::single(row) } else { Output::sum(row, terms.len() as u16) });
            content.terms.extend(terms);
        }
        (call_rows, content)
    })
}

fn values_of(activations: &Activations, row: u32) -> Vec<f32> {
    let range = row as usize * SHAPE.hidden..(row as usize + 1) * SHAPE.hidden;
    match activations {
        Activations::F32(values) => values[range].to_vec(),
        Activations::Bf16(values) => values[range].iter().map(|v| v.to_f32()).collect(),
        Activations::There(_) => panic!("rows that came over a stream"),
    }
}

/// Bytes that are often nearly right.
fn field(len: usize) -> impl Strategy<Value = Bytes> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..100),
        prop::collection::vec(0u8..4, len),
        prop::collection::vec(any::<u8>(), len),
    ]
    .prop_map(Bytes::from)
}

/// What is taken is taken as it came.
fn check_hostile(frame: v1::Frame) {
    if let Ok(taken) = decode(frame.clone()) {
        let encoded = taken.encode(SHAPE.hidden);
        // What choices ask is said by outputs then.
        let expected = if frame.choices.is_some() { encoded.clone() } else { frame.clone() };
        assert_eq!(encoded, v1::Frame { refusal: None, ..expected });
        assert!(decode(encoded).is_ok_and(|again| again.outputs().eq(taken.outputs())));
        assert_eq!(taken.outputs().count(), taken.output_count());
    }
    if let Ok(taken) = AnswerFrame::decode(frame.clone()) {
        let AnswerFrame { header, result } = taken;
        assert_eq!(header.encode()[..], frame.header);
        match result {
            Ok(values) => assert_eq!(values.brought().bytes(), frame.rows),
            Err(refusal) => assert_eq!(Some(refusal.detail), frame.refusal.map(|refusal| refusal.detail)),
        }
    }
}

/// Rows on a GPU are each frame's own, so that what a layer is computed in may be written to; and they come here where the GPU
/// has no room for that.
#[test]
fn rows_on_a_gpu_stay_there_while_there_is_room() {
    let device = moesaic_emulator::test_device(8 << 10, 1);
    let hidden = SHAPE.hidden;
    let x: Vec<u16> = (0..5 * hidden as u16).collect();
    // The last row is none of the call's.
    let there = device.buffer_of(&x).unwrap();
    let part = |rows: &[u32]| {
        let outputs = (0..rows.len() as u16).map(Output::single).collect();
        let content = Content { rows: rows.to_vec(), outputs, terms: vec![term(1, 1.0); rows.len()] };
        Part { worker: 0, content }
    };
    let parts = || vec![part(&[0, 3]), part(&[1, 2, 3])];
    let of = |row: u32| x[row as usize * hidden..][..hidden].to_vec();
    let sent = |parts: Vec<Part>, activations: Vec<Activations>| -> Vec<Vec<u16>> {
        let frames = parts.into_iter().zip(activations);
        let frames = frames.map(|(part, activations)| RequestFrame::new(HEADER, activations, hidden, part.content));
        frames.map(|frame| bytemuck::cast_slice::<u8, u16>(&frame.rows(hidden).brought()).to_vec()).collect()
    };
    let expected = [[of(0), of(3)].concat(), [of(1), of(2), of(3)].concat()];

    let mut own = parts();
    let activations =
        Rows::There(&device, there.view(), &mut None).shared(hidden, &mut own.iter_mut().collect::<Vec<_>>()).unwrap();
    assert!(activations.iter().all(Activations::are_there));
    // Some of a frame's rows, for a worker that is asked instead.
    let again = RequestFrame::new(HEADER, activations[1].clone(), hidden, part(&[0, 2]).content);
    let Payload::There(pieces) = again.rows(hidden) else { panic!("they have come here") };
    assert_eq!(pieces.len(), 2);
    assert_eq!(again.rows(hidden).brought(), bytemuck::cast_slice::<u16, u8>(&[of(1), of(3)].concat()));
    assert_eq!(sent(own, activations), expected);

    let _all = device.buffer::<u8>(device.memory().1).unwrap();
    let mut own = parts();
    let activations =
        Rows::There(&device, there.view(), &mut None).shared(hidden, &mut own.iter_mut().collect::<Vec<_>>()).unwrap();
    assert!(matches!(activations[0], Activations::Bf16(_)));
    assert_eq!(sent(own, activations), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_valid_request_comes_back_as_it_was(
        (call_rows, content) in content(),
        is_f32: bool,
        epoch: u32, layer: u8, micro_batch: u8, source: u16, sequence: u32,
        traceparent in prop::option::of(".{1,60}"),
    ) {
        let values = (0..call_rows * SHAPE.hidden).map(|i| i as f32);
        let rows = match is_f32 {
            true => Activations::from(values.collect::<Vec<f32>>()),
            false => values.map(bf16::from_f32).collect::<Vec<_>>().into(),
        };
        let header = Header { epoch: Epoch(epoch), layer: LayerId(layer), micro_batch, flags: 0, source, slot: 0, sequence };
        let traceparent = traceparent.map(Into::into);
        let sent = RequestFrame::new(header, rows, SHAPE.hidden, content).within(traceparent.clone());
        let back = decode(sent.encode(SHAPE.hidden)).unwrap();

        prop_assert_eq!(back.header, Header { flags: if is_f32 { FLAG_F32 } else { 0 }, ..header });
        prop_assert_eq!(back.row_count(), sent.row_count());
        for row in 0..sent.row_count() as u16 {
            let of = |frame: &RequestFrame| values_of(frame.activations(), frame.position(row));
            prop_assert_eq!(of(&back), of(&sent));
        }
        prop_assert!(back.outputs().eq(sent.outputs()));
        prop_assert_eq!(back.terms(), sent.terms());
        prop_assert_eq!(back.traceparent(), traceparent);
    }

    #[test]
    fn a_frame_of_any_bytes_is_taken_as_it_is_or_refused(
        header in field(Header::LEN),
        flags in prop::option::of(0u16..9),
        (rows, outputs, terms) in (field(32), field(8), field(24)),
        refusal in prop::option::of((any::<i32>(), ".{0,20}")),
        traceparent in ".{0,60}",
        choices in prop::option::of((field(1), 0u32..4, 0u32..9)),
    ) {
        let mut header = header.to_vec();
        if let (Some(flags), Some(place)) = (flags, header.get_mut(6..12)) {
            place.copy_from_slice(&[flags as u8, 0, 1, 0, 0, 0]);
        }
        let refusal = refusal.map(|(reason, detail)| v1::Refusal { reason, detail });
        let choices = choices.map(|(experts, top_k, group_size)| v1::Choices { experts: experts.to_vec(), top_k, group_size, room: 0 });
        check_hostile(v1::Frame { header: header.into(), rows, outputs, terms, refusal, traceparent, choices });
    }

    #[test]
    fn a_valid_frame_with_some_bytes_changed_or_missing_is_taken_as_it_is_or_refused(
        changes in prop::collection::vec((0usize..4, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..4),
    ) {
        let frame = request();
        let mut fields = [frame.header, frame.rows, frame.outputs, frame.terms].map(|field| field.to_vec());
        for (field, place, value, cut) in changes {
            let field = &mut fields[field];
            if !field.is_empty() {
                let place = place.index(field.len());
                field[place] = value;
                field.truncate(if cut { place } else { field.len() });
            }
        }
        let [header, rows, outputs, terms] = fields.map(Bytes::from);
        check_hostile(v1::Frame { header, rows, outputs, terms, ..Default::default() });
    }
}

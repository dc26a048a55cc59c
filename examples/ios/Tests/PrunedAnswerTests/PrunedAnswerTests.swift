import Foundation
import MLX
import XCTest

@testable import PrunedAnswer

final class PrunedAnswerTests: XCTestCase {
    #if os(Linux)  // mlx-swift chooses a GPU unless another device is set
        override class func setUp() { Device.setDefault(device: .cpu) }
    #endif

    private func visual(_ features: MLXArray, _ golden: Golden, _ picture: Int) -> VisualTokens {
        VisualTokens(
            features: features[picture].asType(.float32).asArray(Float.self),
            keptIndices: golden.kept[picture], total: golden.total)
    }

    /// Returns how many of the golden questions get another answer than MLX's.
    private func differences(
        folder: URL = Golden.checkpoint, positions: PrunedAnswer.Positions = .original,
        _ expected: (Golden.Row) -> [Int]
    ) async throws -> Int {
        let (golden, template, features) = try Golden.read()
        let model = try Qwen2Model(folder: folder, dtype: .float32)
        let chat = PrunedAnswer(
            model: model, template: template, tokenizer: golden.tokenizer, positions: positions)
        var count = 0
        for row in golden.questions {
            let answer = try await chat.ask(
                row.question, about: visual(features, golden, row.picture),
                maxTokens: golden.most)
            count += answer.tokenIds == expected(row) ? 0 : 1
        }
        return count
    }

    func testAnswersAtBothPositions() async throws {
        let rows = try Golden.read().golden.questions
        XCTAssertGreaterThanOrEqual(rows.filter { $0.original != $0.contiguous }.count, 17)
        let original = try await differences { $0.original }
        let contiguous = try await differences(positions: .contiguous) { $0.contiguous }
        XCTAssertEqual([original, contiguous], [0, 0])
    }

    func testFollowUpQuestions() async throws {
        let (golden, template, features) = try Golden.read()
        let model = try Qwen2Model(folder: Golden.checkpoint, dtype: .float32)
        let chat = PrunedAnswer(model: model, template: template, tokenizer: golden.tokenizer)
        var last: Int?
        for row in golden.questions {
            let isFirst = row.picture != last
            let picture = isFirst ? visual(features, golden, row.picture) : nil
            if !isFirst {  // a refused question leaves the conversation as it was
                await XCTAssertThrows(.badQuestion("the question is empty; expected a text")) {
                    try await chat.ask(" \n")
                }
            }
            let answer = try await chat.ask(
                row.question, about: picture, maxTokens: golden.most)
            XCTAssertEqual(answer.tokenIds, row.inChat, row.question)
            XCTAssertEqual(answer.finishReason, .stop)
            last = row.picture
        }
    }

    func testQuantizedWeights() async throws {
        let (golden, _, _) = try Golden.read()
        let eight = try await differences(folder: quantized(bits: 8, golden.group)) { $0.bits8 }
        let four = try await differences(folder: quantized(bits: 4, golden.group)) { $0.bits4 }
        XCTAssertEqual([eight, four], [0, 0])
    }

    /// Writes the demo's language model as `mlx_tokprune.convert -q` does.
    private func quantized(bits: Int, _ group: Int) throws -> URL {
        let folder = FileManager.default.temporaryDirectory
            .appendingPathComponent("PrunedAnswer-\(bits)-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        addTeardownBlock { try? FileManager.default.removeItem(at: folder) }
        var arrays = [String: MLXArray]()
        let file = "model.safetensors"
        for (name, stored) in try loadArrays(url: Golden.checkpoint.appendingPathComponent(file))
        where name.hasPrefix("model.layers.") || name.hasPrefix("model.embed")
            || name == "model.norm.weight"
        {
            let (path, array) = ("language_model.\(name)", stored.asType(.float32))
            guard array.ndim == 2 else {
                arrays[path] = array
                continue
            }
            let packed = MLX.quantized(array, groupSize: group, bits: bits)
            let layer = path.dropLast(".weight".count)
            arrays[path] = packed.wq
            arrays["\(layer).scales"] = packed.scales
            arrays["\(layer).biases"] = packed.biases
        }
        try save(arrays: arrays, url: folder.appendingPathComponent(file))
        try write(to: folder) { $0["quantization"] = ["group_size": group, "bits": bits] }
        return folder
    }

    /// Writes the demo's config with a change into a folder.
    private func write(to folder: URL, _ change: (inout [String: Any]) -> Void) throws {
        let data = try Data(contentsOf: Golden.checkpoint.appendingPathComponent("config.json"))
        var config = try JSONSerialization.jsonObject(with: data) as! [String: Any]
        change(&config)
        try JSONSerialization.data(withJSONObject: config)
            .write(to: folder.appendingPathComponent("config.json"))
    }

    func testSettingsThatAreNotComputedAreRefused() throws {
        let folder = FileManager.default.temporaryDirectory
        let changes: [(String, Any)] = [
            ("hidden_act", "gelu"), ("rope_scaling", ["rope_type": "yarn"]),
            ("use_sliding_window", true), ("model_type", "openvla"), ("head_dim", 16),
            ("hidden_size", 0), ("num_attention_heads", 5),
            ("quantization", ["group_size": 32, "bits": 4, "mode": "mxfp4"]),
        ]
        for (name, value) in changes {
            try write(to: folder) { $0[name] = value }
            let file = folder.appendingPathComponent("config.json")
            XCTAssertThrowsError(try LanguageConfiguration(contentsOf: file), name) {
                guard case .unsupported = $0 as? AnswerFailure else { return XCTFail("\($0)") }
            }
        }
    }

    func testWrongInputs() async throws {
        let (golden, template, features) = try Golden.read()
        let model = try Qwen2Model(folder: Golden.checkpoint, dtype: .float32)
        let chat = PrunedAnswer(model: model, template: template, tokenizer: golden.tokenizer)
        let question = golden.questions[0].question
        await XCTAssertThrows(.badQuestion("the first question needs a picture")) {
            try await chat.ask(question)
        }
        let right = visual(features, golden, 0)
        await XCTAssertThrows(.wrongFeatures(numbers: 2, kept: golden.kept[0].count, channels: 192)) {
            try await chat.ask(
                question, about: .init(features: [0, 1], keptIndices: right.keptIndices, total: 64))
        }
        await XCTAssertThrows(.keptOutside(total: 8)) {
            try await chat.ask(
                question,
                about: .init(features: right.features, keptIndices: right.keptIndices, total: 8))
        }
        await XCTAssertThrows(.tooLong(tokens: 4000 + 64, context: 2048)) {
            let prefix = golden.texts[template.prefix]!.count
            let long = TextTokenizer(
                encode: { Array(repeating: 1, count: $0 == template.prefix ? prefix : 4000 - prefix) },
                decode: golden.tokenizer.decode)
            return try await PrunedAnswer(model: model, template: template, tokenizer: long)
                .ask(question, about: right)
        }
        XCTAssertThrowsError(try PromptTemplate(json: nil))
        XCTAssertThrowsError(try Qwen2Model(folder: Golden.folder))
    }

    func testNucleus() throws {
        // Probabilities 0.1, 0.5, 0.05, 0.3, 0.05: likelier ones sum to 0.8, 0, 0.9, 0.5, 0.95.
        let logits = log(MLXArray([0.1, 0.5, 0.05, 0.3, 0.05] as [Float]))
        let kept = Sampling(temperature: 1, topP: 0.79).isInNucleus(logits)
        XCTAssertEqual(kept.asArray(Bool.self), [false, true, false, true, false])
        XCTAssertEqual(try Sampling(temperature: 1, topP: 0.01).token(logits), 1)
        XCTAssertEqual(try Sampling.greedy.token(logits), 1)
        MLXRandom.seed(3)
        let drawn = try (0..<400).map { _ in
            try Sampling(temperature: 1, topP: 0.79).token(logits)
        }
        XCTAssertEqual(Set(drawn), [1, 3])
        XCTAssertEqual(Double(drawn.filter { $0 == 1 }.count) / 400, 0.625, accuracy: 0.08)
        XCTAssertThrowsError(try Sampling.greedy.token(MLXArray([0, Float.nan])))
    }
}

private func XCTAssertThrows(
    _ expected: AnswerFailure, _ ask: () async throws -> PrunedAnswer.Answer
) async {
    do {
        _ = try await ask()
        XCTFail("no error; expected \(expected)")
    } catch {
        XCTAssertEqual(error as? AnswerFailure, expected)
        XCTAssertFalse(error.localizedDescription.isEmpty)
    }
}

import Foundation

/// Packing of a quantized matrix: weights per scale, and bits per weight (mode affine).
struct QuantizationFormat: Equatable, Sendable {
    let groupSize: Int
    let bits: Int
}

/// Sizes of a Qwen2 decoder and the packing of its weights, from a `config.json`.
public struct LanguageConfiguration: Equatable, Sendable {
    public let hiddenSize, layers, heads, keyValueHeads, feedForwardSize: Int
    public let vocabulary: Int
    /// Positions that the model was trained on.
    public let context: Int
    let normEpsilon, ropeBase: Float
    let usesEmbeddingsAsHead: Bool
    /// By layer name, with "" for all others; nil for a layer that is not quantized.
    let formats: [String: QuantizationFormat?]

    var headSize: Int { hiddenSize / heads }

    /// Reads a `config.json` with its text settings at the top or in `text_config`.
    ///
    /// Settings that would change the numbers, and that are not computed here, throw.
    public init(contentsOf url: URL) throws {
        let file = url.lastPathComponent
        guard let data = try? Data(contentsOf: url),
            let outer = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
        else { throw AnswerFailure.unreadable(file: file) }
        let inner = outer["text_config"] as? [String: Any] ?? [:]
        let text = outer.merging(inner) { $1 }

        func size(_ name: String, default value: Int? = nil) throws -> Int {
            guard let number = (text[name] as? NSNumber)?.intValue ?? value, number > 0
            else { throw Self.unsupported(name, text[name], "a positive number") }
            return number
        }
        func number(_ name: String, default value: Float) -> Float {
            (text[name] as? NSNumber)?.floatValue ?? value
        }
        hiddenSize = try size("hidden_size")
        layers = try size("num_hidden_layers")
        heads = try size("num_attention_heads")
        keyValueHeads = try size("num_key_value_heads", default: heads)
        feedForwardSize = try size("intermediate_size")
        vocabulary = try size("vocab_size")
        context = try size("max_position_embeddings", default: 32768)
        normEpsilon = number("rms_norm_eps", default: 1e-6)
        let rope = text["rope_parameters"] as? [String: Any] ?? [:]
        ropeBase = (rope["rope_theta"] as? NSNumber)?.floatValue
            ?? number("rope_theta", default: 10000)
        usesEmbeddingsAsHead = text["tie_word_embeddings"] as? Bool ?? false
        formats = try Self.formats(outer["quantization"] ?? outer["quantization_config"])
        try check(text, rope)
    }

    private func check(_ text: [String: Any], _ rope: [String: Any]) throws {
        let scaling = text["rope_scaling"] as? [String: Any] ?? rope
        let rotary = scaling["rope_type"] ?? scaling["type"]
        let kinds = text["layer_types"] as? [String] ?? []
        let headDimension = (text["head_dim"] as? NSNumber)?.intValue ?? headSize
        let checks: [(String, Any?, Bool, String)] = [
            ("model_type", text["model_type"],
             [nil, "llava_qwen2", "fastvlm", "fast_vlm", "qwen2"].contains(
                text["model_type"] as? String), "Qwen2, the language model of FastVLM"),
            ("num_attention_heads", heads, hiddenSize % heads == 0, "a divisor of hidden_size"),
            ("num_key_value_heads", keyValueHeads, heads % keyValueHeads == 0,
             "a divisor of num_attention_heads"),
            ("head_dim", headDimension, headDimension == headSize, "\(headSize)"),
            ("hidden_act", text["hidden_act"],
             [nil, "silu", "swish"].contains(text["hidden_act"] as? String), "silu"),
            ("rope_type", rotary, rotary == nil || rotary as? String == "default", "default"),
            ("use_sliding_window", text["use_sliding_window"],
             text["use_sliding_window"] as? Bool != true, "false"),
            ("layer_types", kinds, kinds.allSatisfy { $0 == "full_attention" }, "full_attention"),
        ]
        for (name, value, isRight, expected) in checks where !isRight {
            throw Self.unsupported(name, value, expected)
        }
    }

    private static func formats(_ section: Any?) throws -> [String: QuantizationFormat?] {
        guard let section = section as? [String: Any] else { return [:] }
        func format(_ entry: [String: Any]) throws -> QuantizationFormat {
            let mode = entry["mode"] as? String ?? "affine"
            guard mode == "affine", let group = (entry["group_size"] as? NSNumber)?.intValue,
                let bits = (entry["bits"] as? NSNumber)?.intValue,
                [32, 64, 128].contains(group), [4, 8].contains(bits)
            else {
                throw unsupported(
                    "quantization", entry, "4 or 8 bits in groups of 32, 64 or 128, mode affine")
            }
            return QuantizationFormat(groupSize: group, bits: bits)
        }
        var formats: [String: QuantizationFormat?] = ["": try format(section)]
        for (name, value) in section where value is [String: Any] || name.contains(".") {
            let entry = value as? [String: Any]
            formats.updateValue(try entry.map(format), forKey: name)
        }
        return formats
    }

    private static func unsupported(
        _ name: String, _ value: Any?, _ expected: String
    ) -> AnswerFailure {
        .unsupported(setting: "\(name) \(value ?? "missing")", expected: expected)
    }
}

import Foundation
import MLX

/// A linear layer or an embedding table, plain or as `mx.quantize` packs it.
struct Matrix {
    let weight: MLXArray
    let scales: MLXArray?
    let biases: MLXArray?
    let bias: MLXArray?
    let format: QuantizationFormat?

    /// (..., columns) to (..., rows).
    func callAsFunction(_ x: MLXArray) -> MLXArray {
        guard let scales, let format else {
            guard let bias else { return matmul(x, weight.T) }
            return addMM(bias, x, weight.T)
        }
        let product = quantizedMM(
            x, weight, scales: scales, biases: biases, transpose: true,
            groupSize: format.groupSize, bits: format.bits)
        return bias.map { product + $0 } ?? product
    }

    /// The rows of token ids (L,), as (L, columns).
    func rows(_ ids: MLXArray) -> MLXArray {
        guard let scales, let format else { return weight[ids] }
        return dequantized(
            weight[ids], scales: scales[ids], biases: biases.map { $0[ids] },
            groupSize: format.groupSize, bits: format.bits)
    }
}

/// The tensors of a checkpoint folder, read when they are used.
struct Weights {
    private let arrays: [String: MLXArray]
    private let formats: [String: QuantizationFormat?]
    private let prefix: String
    private let dtype: DType?

    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// Names are those of the MLX layout, or Apple's. `dtype` replaces the stored type.
    init(folder: URL, configuration: LanguageConfiguration, dtype: DType?) throws {
        var arrays = [String: MLXArray]()
        for file in try Self.files(folder) {
            guard let part = try? loadArrays(url: folder.appendingPathComponent(file)) else {
                throw AnswerFailure.unreadable(file: file)
            }
            arrays.merge(part) { $1 }
        }
        let prefixes = ["language_model.", ""]
        let embedding = "model.embed_tokens.weight"
        guard let prefix = prefixes.first(where: { arrays[$0 + embedding] != nil }) else {
            throw AnswerFailure.missingTensor(prefixes[0] + embedding)
        }
        (self.arrays, self.prefix, self.dtype) = (arrays, prefix, dtype)
        formats = configuration.formats
    }

    private static func files(_ folder: URL) throws -> Set<String> {
        let index = "model.safetensors.index.json"
        guard let data = try? Data(contentsOf: folder.appendingPathComponent(index)) else {
            return ["model.safetensors"]
        }
        let object = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
        guard let map = object?["weight_map"] as? [String: String],
            map.values.allSatisfy({ !$0.contains("/") && $0.hasSuffix(".safetensors") })
        else { throw AnswerFailure.unreadable(file: index) }
        return Set(map.values)
    }

    func has(_ name: String) -> Bool { arrays[prefix + name] != nil }

    /// A tensor in the type of computation; throws unless it has this shape.
    func array(_ name: String, _ shape: [Int], isPacked: Bool = false) throws -> MLXArray {
        guard let array = arrays[prefix + name] else {
            throw AnswerFailure.missingTensor(prefix + name)
        }
        guard array.shape == shape else {
            throw AnswerFailure.wrongShape(
                tensor: prefix + name, shape: array.shape, expected: shape)
        }
        guard !isPacked, let dtype else { return array }
        return array.asType(dtype)
    }

    /// The layer of this name, with a bias where `hasBias`.
    func matrix(_ name: String, rows: Int, columns: Int, hasBias: Bool = false) throws -> Matrix {
        let bias = hasBias ? try array("\(name).bias", [rows]) : nil
        guard has("\(name).scales") else {
            let weight = try array("\(name).weight", [rows, columns])
            return Matrix(weight: weight, scales: nil, biases: nil, bias: bias, format: nil)
        }
        guard let format = formats[prefix + name] ?? formats[""] ?? nil else {
            throw AnswerFailure.unsupported(
                setting: "\(name) with scales", expected: "its quantization in config.json")
        }
        let groups = [rows, columns / format.groupSize]
        return Matrix(
            weight: try array(
                "\(name).weight", [rows, columns * format.bits / 32], isPacked: true),
            scales: try array("\(name).scales", groups),
            biases: try array("\(name).biases", groups),
            bias: bias, format: format)
    }
}

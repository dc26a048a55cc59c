import Foundation

/// Why a model, a prompt or a question cannot be used.
public enum AnswerFailure: Error, Equatable, LocalizedError {
    case unreadable(file: String)
    case unsupported(setting: String, expected: String)
    case missingTensor(String)
    case wrongShape(tensor: String, shape: [Int], expected: [Int])
    case wrongFeatures(numbers: Int, kept: Int, channels: Int)
    case keptOutside(total: Int)
    case tokenOutside(id: Int, vocabulary: Int)
    case badQuestion(String)
    case tooLong(tokens: Int, context: Int)
    case notFinite

    public var errorDescription: String? {
        switch self {
        case .unreadable(let file):
            return "\(file) cannot be read; expected a file that mlx_tokprune wrote"
        case .unsupported(let setting, let expected):
            return "\(setting) is not supported; expected \(expected)"
        case .missingTensor(let name):
            return "the checkpoint has no \(name); expected a FastVLM checkpoint"
        case .wrongShape(let name, let shape, let expected):
            return "\(name) has shape \(shape), but config.json describes \(expected)"
        case .wrongFeatures(let numbers, let kept, let channels):
            return "\(numbers) features for \(kept) visual tokens; the language model "
                + "expects \(channels) each, from a package with its projector"
        case .keptOutside(let total):
            return "kept indices must be ascending and from 0 to \(total - 1)"
        case .tokenOutside(let id, let vocabulary):
            return "the tokenizer gave id \(id), but the model has \(vocabulary) tokens; "
                + "expected the tokenizer of the checkpoint"
        case .badQuestion(let reason):
            return reason
        case .tooLong(let tokens, let context):
            return "the conversation has \(tokens) positions, but the model reads \(context); "
                + "expected a shorter question, or a new picture"
        case .notFinite:
            return "the model's numbers are not finite; expected another type, such as "
                + "bfloat16, or an undamaged checkpoint"
        }
    }
}

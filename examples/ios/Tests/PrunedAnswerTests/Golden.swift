import Foundation
import MLX

@testable import PrunedAnswer

/// Questions about the demo model's pictures with MLX's answers (make_golden.py).
struct Golden: Decodable {
    struct Row: Decodable {
        let picture: Int
        let question: String
        let original, contiguous: [Int]
        /// The answer behind the picture's questions before it.
        let inChat: [Int]
        let bits8, bits4: [Int]

        enum CodingKeys: String, CodingKey {
            case picture, question, original, contiguous
            case inChat = "in_chat", bits8 = "bits_8", bits4 = "bits_4"
        }
    }

    let texts: [String: [Int]]
    let total, group, most: Int
    let kept: [[Int]]
    let questions: [Row]

    static let folder = Bundle.module.resourceURL!.appendingPathComponent("Golden")
    /// The demo model of the repository.
    static let checkpoint = URL(fileURLWithPath: #filePath)
        .appendingPathComponent("../../../../../mlx_tokprune/demo/checkpoint").standardized

    static func read() throws -> (golden: Golden, template: PromptTemplate, features: MLXArray) {
        let data = try Data(contentsOf: folder.appendingPathComponent("answers.json"))
        let decoder = JSONDecoder()
        let golden = try decoder.decode(Golden.self, from: data)
        let object = try JSONSerialization.jsonObject(with: data) as! [String: Any]
        let prompt = try JSONSerialization.data(withJSONObject: object["prompt"]!)
        let template = try PromptTemplate(json: String(decoding: prompt, as: UTF8.self))
        let arrays = try loadArrays(url: folder.appendingPathComponent("features.safetensors"))
        return (golden, template, arrays["features"]!)
    }

    /// The golden texts, each with its ids: a tokenizer that knows nothing else.
    var tokenizer: TextTokenizer {
        let texts = texts
        return TextTokenizer(
            encode: { texts[$0] ?? [] }, decode: { $0.map(String.init).joined(separator: " ") })
    }
}

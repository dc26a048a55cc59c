import XCTest

@testable import PrunedVision

final class PrunedVisionTests: XCTestCase {
    func testFunctionNames() {
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 0.5), "keep_50")
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 0.125), "keep_12_5")
        XCTAssertEqual(PrunedVision.functionName(keepRatio: 1), "unpruned")
    }

    func testMetadata() throws {
        let text = """
            [{"name": "keep_50", "method": "norm", "keep_ratio": 0.5, "keep": 128,
              "grid": [16, 16], "channels": 896, "image_size": 1024,
              "projector": true, "image": true},
             {"name": "unpruned", "method": "none", "keep_ratio": null, "keep": 256,
              "grid": [16, 16], "channels": 896, "image_size": 1024,
              "projector": true, "image": true}]
            """
        let functions = try PrunedVision.decode(text)
        XCTAssertEqual(functions.map(\.name), ["keep_50", "unpruned"])
        XCTAssertEqual(functions.map(\.keep), [128, 256])
        XCTAssertNil(functions[1].keepRatio)
    }
}

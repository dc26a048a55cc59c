// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "PrunedVision",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "PrunedVision", targets: ["PrunedVision"]),
        .library(name: "PrunedAnswer", targets: ["PrunedAnswer"]),
    ],
    dependencies: [
        .package(url: "https://github.com/ml-explore/mlx-swift", .upToNextMinor(from: "0.31.4"))
    ],
    targets: [
        .target(name: "PrunedVision"),
        .target(name: "PrunedAnswer", dependencies: [.product(name: "MLX", package: "mlx-swift")]),
        .testTarget(name: "PrunedVisionTests", dependencies: ["PrunedVision"]),
        .testTarget(
            name: "PrunedAnswerTests", dependencies: ["PrunedAnswer"],
            resources: [.copy("Golden")]),
    ],
    // Mode 6 would make errors of Apple's annotations, which differ between SDKs.
    swiftLanguageModes: [.v5]
)

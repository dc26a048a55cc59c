import CoreImage
import CoreVideo
import Foundation

extension PrunedVision {

    /// A picture centred on a black square of `function.imageSize` pixels per side, as
    /// FastVLM was trained on. The picture must be upright (`CIImage.oriented`).
    ///
    /// The exporter's own preprocessing is Pillow's bicubic; Core Image scales differently,
    /// so features differ a little from those of `mlx_tokprune.generate`.
    public func square(_ picture: CIImage) throws -> sending CVPixelBuffer {
        let extent = picture.extent
        guard !extent.isEmpty, !extent.isInfinite else { throw Failure.cannotDraw }
        let side = CGFloat(function.imageSize)
        let (width, height) = Self.fitted(extent.size, side: side)
        let frame = CGRect(x: 0, y: 0, width: side, height: side)
        let drawn =
            picture
            .transformed(by: CGAffineTransform(translationX: -extent.minX, y: -extent.minY))
            .transformed(
                by: CGAffineTransform(scaleX: width / extent.width, y: height / extent.height),
                highQualityDownsample: true
            )
            .transformed(
                by: CGAffineTransform(
                    translationX: (side - width) / 2, y: (side - height) / 2)
            )
            .composited(over: CIImage(color: .black))
            .cropped(to: frame)
        // New, and kept by nobody else: the caller may send it to another actor.
        nonisolated(unsafe) let buffer = try Self.makeBuffer(side: function.imageSize)
        // No colour space: nothing is to be converted on the way out either.
        context.render(drawn, to: buffer, bounds: frame, colorSpace: nil)
        return buffer
    }

    /// (width, height) of a picture scaled so that the longer one is `side`.
    static func fitted(_ size: CGSize, side: CGFloat) -> (CGFloat, CGFloat) {
        let scale = side / max(size.width, size.height)
        return (size.width * scale, size.height * scale)
    }

    private static func makeBuffer(side: Int) throws -> CVPixelBuffer {
        let surface: [String: Any] = [:]
        let attributes: [CFString: Any] = [kCVPixelBufferIOSurfacePropertiesKey: surface]
        var created: CVPixelBuffer?
        let status = CVPixelBufferCreate(
            nil, side, side, kCVPixelFormatType_32BGRA, attributes as CFDictionary, &created)
        guard status == kCVReturnSuccess, let buffer = created else {
            throw Failure.cannotDraw
        }
        return buffer
    }
}

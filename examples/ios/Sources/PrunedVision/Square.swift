import CoreImage
import CoreVideo

/// A picture centred on a black square of `side` pixels, as FastVLM was trained on.
///
/// The exporter's own preprocessing is Pillow's bicubic; Core Image scales differently,
/// so features differ a little from those of `mlx_tokprune.generate`.
public func square(_ picture: CIImage, side: Int, context: CIContext) -> CVPixelBuffer? {
    let extent = picture.extent
    let scale = CGFloat(side) / max(extent.width, extent.height)
    let frame = CGRect(x: 0, y: 0, width: side, height: side)
    let left = (CGFloat(side) - extent.width * scale) / 2
    let bottom = (CGFloat(side) - extent.height * scale) / 2
    let scaled =
        picture
        .transformed(by: CGAffineTransform(translationX: -extent.minX, y: -extent.minY))
        .transformed(by: CGAffineTransform(scaleX: scale, y: scale), highQualityDownsample: true)
        .transformed(by: CGAffineTransform(translationX: left, y: bottom))
        .composited(over: CIImage(color: .black))
        .cropped(to: frame)
    var buffer: CVPixelBuffer?
    let attributes = [kCVPixelBufferIOSurfacePropertiesKey: [:] as CFDictionary] as CFDictionary
    CVPixelBufferCreate(nil, side, side, kCVPixelFormatType_32BGRA, attributes, &buffer)
    guard let buffer else { return nil }
    let sRGB = CGColorSpace(name: CGColorSpace.sRGB)
    context.render(scaled, to: buffer, bounds: frame, colorSpace: sRGB)
    return buffer
}

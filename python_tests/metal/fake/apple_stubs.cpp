// Functions of Metal that metal-cpp names and that nothing here calls.

#define NOT_HERE(name) \
  void* name() {       \
    return nullptr;    \
  }

extern "C" {
NOT_HERE(MTLCopyAllDevices)
NOT_HERE(MTLCopyAllDevicesWithObserver)
NOT_HERE(MTLCreateSystemDefaultDevice)
NOT_HERE(MTLIOCompressionContextAppendData)
NOT_HERE(MTLIOCompressionContextDefaultChunkSize)
NOT_HERE(MTLIOCreateCompressionContext)
NOT_HERE(MTLIOFlushAndDestroyCompressionContext)
NOT_HERE(MTLRemoveDeviceObserver)
}

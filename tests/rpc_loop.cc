// The part of TVM's RPC server that runs on a board: `rpc_loop DESCRIPTOR FOLDER` serves one session on a connected socket.
// tests/emulated_board.py does the handshake and talks to the tracker; this runs under an emulator.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <string>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string folder = argv[2];
  auto path = [folder](std::string name) { return folder + "/" + name; };
  auto load = [path](std::string name) { return tvm::ffi::Module::LoadFromFile(path(name)); };
  tvm::ffi::Function::SetGlobal("tvm.rpc.server.workpath", tvm::ffi::Function::FromTyped(path), true);
  tvm::ffi::Function::SetGlobal("tvm.rpc.server.load_module", tvm::ffi::Function::FromTyped(load), true);
  tvm::ffi::Function::GetGlobalRequired("rpc.ServerLoop")(std::atoi(argv[1]));
  return 0;
}

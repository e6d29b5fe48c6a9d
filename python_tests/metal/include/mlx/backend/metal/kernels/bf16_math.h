// In place of MLX's header, which builds on functions of Apple's own library.

#pragma once
